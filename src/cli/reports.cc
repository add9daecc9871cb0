#include "cli/reports.h"

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>

#include "base/bytes.h"
#include "base/text.h"
#include "cli/table.h"

namespace tensord::cli {

using base::Code;
using base::fail;
using base::human_bytes;
using base::text;
using nlohmann::json;

namespace {

// Parses `report` and hands it to `read`. The library's exceptions (no JSON, a field missing or of another
// type) end here.
template <typename Read>
auto read_report(std::string_view report, Read read) -> Result<decltype(read(json()))> {
  try {
    return read(json::parse(report));
  } catch (const json::exception& exception) {
    return fail(Code::internal, text("the daemon's answer cannot be read: ", exception.what()));
  }
}

std::string dump(const json& document) {
  return document.dump(-1, ' ', false, json::error_handler_t::replace);
}

std::string string_or(const json& value, const std::string& otherwise) {
  return value.is_string() ? value.get<std::string>() : otherwise;
}

std::string count_of(uint64_t count, std::string_view noun) {
  return text(count, " ", noun, count == 1 ? "" : "s");
}

std::string seconds(double value) { return human_ns(static_cast<int64_t>(value * 1e9)); }

std::string rate(uint64_t bytes, int64_t ns) {
  return bytes == 0 || ns <= 0 ? "" : decimals(static_cast<double>(bytes) / static_cast<double>(ns), 2);
}

std::string holders_of(const json& replica) {
  std::map<std::string, int> leases;  // one process may hold several
  for (const json& lease : replica.at("leases")) {
    ++leases[text(string_or(lease.at("name"), "?"), " ", lease.at("pid").get<int64_t>())];
  }
  std::string out;
  for (const auto& [process, count] : leases) {
    out += (out.empty() ? "" : ", ") + process + (count > 1 ? text(" (", count, ")") : "");
  }
  if (replica.at("pinned").get<bool>()) out = out.empty() ? "pinned" : "pinned, " + out;
  return out.empty() ? text("- (idle ", seconds(replica.at("idle_s").get<double>()), ")") : out;
}

// "12" tensors, or "12 of 443" where only some of the files' were asked for.
std::string tensors_of(const json& value) {
  const auto count = value.value("tensor_count", uint64_t{0});
  const auto whole = value.value("whole_tensor_count", count);
  return value.value("only", json()).is_null() ? text(count) : text(count, " of ", whole);
}

std::string state_of(const json& replica) {
  const std::string state = replica.at("state").get<std::string>();
  const auto total = replica.value("total_bytes", uint64_t{0});
  if (state != "filling" || total == 0) return state;
  return text(state, " ", replica.value("ready_bytes", uint64_t{0}) * 100 / total, " %");
}

}  // namespace

Result<std::string> status_text(std::string_view report) {
  return read_report(report, [](const json& status) {
    const json& limits = status.at("limits");
    const json& memory = status.at("memory");
    const auto loads = status.at("loads_running").get<uint64_t>();
    return text("daemon    pid ", status.at("pid").get<int64_t>(), ", tensord ",
                status.at("version").get<std::string>(), ", up ",
                seconds(status.at("uptime_s").get<double>()), "\n",                           //
                "socket    ", status.at("socket").get<std::string>(), "\n",                   //
                "state     ", status.at("state_dir").get<std::string>(), "\n",                //
                "memory    ", human_bytes(memory.at("in_use").get<uint64_t>()), " of ",       //
                human_bytes(limits.at("host_memory").get<uint64_t>()), " in use, ",           //
                human_bytes(memory.at("kept").get<uint64_t>()), " kept for the next load\n",  //
                "replicas  ", status.at("replicas").get<uint64_t>(), ", ", loads,
                loads == 1 ? " load" : " loads",
                " running\n",                                                                       //
                "reading   ", count_of(limits.at("read_threads").get<uint64_t>(), "thread"), "\n",  //
                "clients   ", count_of(status.at("connections").get<uint64_t>(), "connection"), "\n");
  });
}

Result<std::string> list_text(std::string_view report) {
  return read_report(report, [](const json& list) {
    if (list.at("replicas").empty())
      return std::string("nothing is resident; `tensord load PATH` loads a checkpoint\n");
    Table table({{"replica", Align::right},
                 {"state"},
                 {"size", Align::right},
                 {"tensors", Align::right},
                 {"artifact"},
                 {"held by"},
                 {"path"}});
    std::string errors;
    for (const json& replica : list.at("replicas")) {
      table.add({text(replica.at("replica").get<uint64_t>()), state_of(replica),
                 human_bytes(replica.value("payload_bytes", uint64_t{0})), tensors_of(replica),
                 string_or(replica.at("artifact"), "-").substr(0, 12), holders_of(replica),
                 replica.at("path").get<std::string>()});
      if (const json& error = replica.at("error"); !error.is_null()) {
        errors += text("replica ", replica.at("replica").get<uint64_t>(),
                       " failed: ", error.at("message").get<std::string>(), "\n");
      }
    }
    return table.text() + errors;
  });
}

Result<std::string> replica_text(std::string_view done, std::string_view report) {
  return read_report(report, [&](const json& replica) {
    return text(done, " replica ", replica.at("replica").get<uint64_t>(), " (",
                replica.at("path").get<std::string>(), ", ",
                human_bytes(replica.at("memory_bytes").get<uint64_t>()), ")\n");
  });
}

Result<std::string> load_text(std::string_view info) {
  return read_report(info, [](const json& model) {
    const bool ready = model.at("state").get<std::string>() == "ready";
    std::string out = text(model.at("path").get<std::string>(), ": ",
                           human_bytes(model.at("payload_bytes").get<uint64_t>()), " in ",
                           count_of(model.at("tensor_count").get<uint64_t>(), "tensor"), ", replica ",
                           model.at("replica").get<uint64_t>());
    out += ready ? ", artifact " + string_or(model.at("artifact"), "-") + "\n"
                 : std::string(" (filling; `tensord load --wait` watches it)\n");
    return out;
  });
}

Result<Verified> verify_text(std::string_view report) {
  return read_report(report, [](const json& verify) {
    const json& faults = verify.at("faults");
    const auto bytes = verify.at("bytes").get<uint64_t>();
    const auto ns = verify.at("ns").get<int64_t>();
    std::string out;
    for (const json& fault : faults) {
      out += text(fault.at("file").get<std::string>(), ": tensor ",
                  base::quoted(fault.at("tensor").get<std::string>()), ", block ",
                  fault.at("leaf").get<uint64_t>(), " (", fault.at("size_bytes").get<uint64_t>(), " B at ",
                  fault.at("offset").get<uint64_t>(), "): not what was loaded first\n");
    }
    out += text(verify.at("path").get<std::string>(), ": ",
                faults.empty() ? "sound" : count_of(faults.size(), "corrupt block"), "; ",
                verify.at("leaf_count").get<uint64_t>(), " blocks, ", human_bytes(bytes), " checked in ",
                human_ns(ns), bytes == 0 ? "" : text(", ", rate(bytes, ns), " GB/s"), "\n");
    return Verified{.text = std::move(out), .sound = faults.empty()};
  });
}

std::string error_json(const base::Error& error) {
  return dump({{"error", {{"code", base::code_name(error.code)}, {"message", error.message}}}});
}

}  // namespace tensord::cli
