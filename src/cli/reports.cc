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

uint64_t number(const json& object, const char* field) { return object.at(field).get<uint64_t>(); }
std::string words(const json& object, const char* field) { return object.at(field).get<std::string>(); }
std::string size(const json& object, const char* field) { return human_bytes(number(object, field)); }

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

std::string only_of(const json& value) {
  std::string out;
  for (const json& words : value.at("only")) out += (out.empty() ? "" : ", ") + words.get<std::string>();
  return out;
}

std::string state_of(const json& replica) {
  const std::string state = replica.at("state").get<std::string>();
  const auto total = replica.value("total_bytes", uint64_t{0});
  if (state != "filling" || total == 0) return state;
  return text(state, " ", replica.value("ready_bytes", uint64_t{0}) * 100 / total, " %");
}

std::string phases_table(const json& phases) {
  Table table({{"phase"},
               {"time", Align::right},
               {"threads' time", Align::right},
               {"bytes", Align::right},
               {"GB/s", Align::right},
               {"share", Align::right},
               {""}});
  for (const json& phase : phases) {
    if (phase.at("thread_ns").get<int64_t>() == 0) continue;  // nobody mapped or copied yet
    const auto bytes = phase.at("bytes").get<uint64_t>();
    const double share = phase.at("share").get<double>();
    std::string name = phase.at("name").get<std::string>();
    std::replace(name.begin(), name.end(), '_', ' ');
    table.add({name, human_ns(phase.at("ns").get<int64_t>()), human_ns(phase.at("thread_ns").get<int64_t>()),
               bytes == 0 ? "" : human_bytes(bytes),
               bytes == 0 ? "" : decimals(phase.at("gb_per_s").get<double>(), 2),
               decimals(share * 100, 1) + " %", bar(share, 20)});
  }
  return table.text();
}

std::string uses_table(const json& uses) {
  Table table({{"process"},
               {"map", Align::right},
               {"plan", Align::right},
               {"wait", Align::right},
               {"copy", Align::right},
               {"copied", Align::right},
               {"GB/s", Align::right},
               {"records", Align::right},
               {"threads", Align::right}});
  for (const json& use : uses) {
    const auto ns = [&](const char* field) { return human_ns(use.at(field).get<int64_t>()); };
    const auto bytes = use.at("copy_bytes").get<uint64_t>();
    table.add({text(string_or(use.at("name"), "?"), " ", use.at("pid").get<int64_t>()), ns("map_ns"),
               ns("plan_ns"), ns("wait_ns"), ns("copy_ns"), human_bytes(bytes),
               rate(bytes, use.at("copy_ns").get<int64_t>()), text(use.at("record_count").get<uint64_t>()),
               text(use.at("thread_count").get<uint64_t>())});
  }
  return table.text();
}

// Where the bytes came from.
std::string origins(const json& report) {
  std::string out;
  const auto add = [&](const char* name, const char* how) {
    const auto bytes = report.at(name).get<uint64_t>();
    if (bytes > 0) out += text(out.empty() ? "; " : ", ", human_bytes(bytes), how);
  };
  add("cached_bytes", " from the page cache");
  add("direct_bytes", text(" by ", report.at("read_path").get<std::string>()).c_str());
  add("buffered_bytes", " from the disk through the page cache");
  return out;
}

std::string explained(const json& report) {
  const std::string checked = report.at("checked_against").get<std::string>();
  std::string out = text(
      "load ", report.at("load").get<uint64_t>(), " of ", report.at("path").get<std::string>(), ": ",
      report.at("state").get<std::string>(), "\n", human_bytes(report.at("bytes").get<uint64_t>()), " in ",
      human_ns(report.at("wall_ns").get<int64_t>()), ", ", decimals(report.at("gb_per_s").get<double>(), 2),
      " GB/s, by ", count_of(report.at("read_threads").get<uint64_t>(), "thread"), origins(report), "\n",
      checked == "recorded" ? "every byte is what it was at the first load\n"
                            : "the first load of these files: their digests were recorded\n");
  if (!report.value("only", json()).is_null())
    out += text("only ", tensors_of(report), " tensors: ", only_of(report), "\n");
  for (const json& note : report.at("notes")) out += note.get<std::string>() + "\n";
  if (const json& error = report.at("error"); !error.is_null()) {
    out += text("error: ", error.at("code").get<std::string>(), ": ", error.at("message").get<std::string>(),
                "\n");
  }
  out += "\n" + phases_table(report.at("phases"));
  const std::string limit = string_or(report.at("limited_by"), "");
  if (!limit.empty()) out += text("\nlimited by ", limit, ". ", string_or(report.at("advice"), ""), "\n");
  if (!report.at("uses").empty()) out += "\n" + uses_table(report.at("uses"));
  return out;
}

Result<std::string> traced(const json& report) {
  if (!report.contains("trace") || report.at("trace").empty()) {
    return fail(
        Code::not_found,
        "the daemon kept no trace of this load: it does so at log level debug; stop it, start it with "
        "`tensord serve --log-level debug`, and load again");
  }
  json events = json::array();
  std::map<std::string, int> tracks;
  for (const json& span : report.at("trace")) {
    const std::string thread = span.at("thread").get<std::string>();
    const auto [track, added] = tracks.try_emplace(thread, static_cast<int>(tracks.size()) + 1);
    if (added) {
      events.push_back({{"name", "thread_name"},
                        {"ph", "M"},
                        {"pid", 1},
                        {"tid", track->second},
                        {"args", {{"name", thread}}}});
    }
    const auto begin_ns = span.at("begin_ns").get<int64_t>();
    json details = span;
    for (const char* told : {"name", "thread", "begin_ns", "end_ns"}) details.erase(told);
    // "X" is a complete event; its times are microseconds.
    events.push_back({{"name", span.at("name")},
                      {"ph", "X"},
                      {"pid", 1},
                      {"tid", track->second},
                      {"ts", static_cast<double>(begin_ns) / 1e3},
                      {"dur", static_cast<double>(span.at("end_ns").get<int64_t>() - begin_ns) / 1e3},
                      {"args", std::move(details)}});
  }
  return dump({{"displayTimeUnit", "ms"}, {"traceEvents", std::move(events)}});
}

}  // namespace

Result<std::string> status_text(std::string_view report) {
  return read_report(report, [](const json& status) {
    const json& limits = status.at("limits");
    const json& memory = status.at("memory");
    std::string waiting;
    for (const json& one : status.at("waiting")) {
      waiting += text("waiting   pid ", number(one, "pid"), ", ", words(one, "path"), ": ",
                      words(one, "waits_for"), "\n");
    }
    return text("daemon    pid ", number(status, "pid"), ", tensord ", words(status, "version"), ", up ",
                seconds(status.at("uptime_s").get<double>()),  //
                "\nsocket    ", words(status, "socket"),       //
                "\nstate     ", words(status, "state_dir"),    //
                "\nmemory    ", size(memory, "in_use"), " of ", size(limits, "host_memory"), " in use, ",
                size(memory, "kept"), " kept for the next load",  //
                "\nreplicas  ", number(status, "replicas"), ", ",
                count_of(number(status, "loads_running"), "load"), " running",       //
                "\nreading   ", count_of(number(limits, "read_threads"), "thread"),  //
                "\nclients   ", count_of(number(status, "connections"), "connection"), "\n", waiting);
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
      const auto id = number(replica, "replica");
      table.add({text(id), state_of(replica), human_bytes(replica.value("payload_bytes", uint64_t{0})),
                 tensors_of(replica), string_or(replica.at("artifact"), "-").substr(0, 12),
                 holders_of(replica), words(replica, "path")});
      if (const json& error = replica.at("error"); !error.is_null())
        errors += text("replica ", id, " failed: ", words(error, "message"), "\n");
    }
    return table.text() + errors;
  });
}

Result<std::string> explain_text(std::string_view report) { return read_report(report, explained); }

Result<std::string> replica_text(std::string_view done, std::string_view report) {
  return read_report(report, [&](const json& replica) {
    return text(done, " replica ", number(replica, "replica"), " (", words(replica, "path"), ", ",
                size(replica, "memory_bytes"), ")\n");
  });
}

Result<std::string> load_text(std::string_view info) {
  return read_report(info, [](const json& model) {
    const bool ready = words(model, "state") == "ready";
    return text(words(model, "path"), ": ", size(model, "payload_bytes"), " in ",
                count_of(number(model, "tensor_count"), "tensor"), ", replica ", number(model, "replica"),
                ready ? ", artifact " + string_or(model.at("artifact"), "-")
                      : " (filling; `tensord load --wait` watches it)",
                "\n");
  });
}

Result<Verified> verify_text(std::string_view report) {
  return read_report(report, [](const json& verify) {
    const json& faults = verify.at("faults");
    const uint64_t bytes = number(verify, "bytes");
    const auto ns = verify.at("ns").get<int64_t>();
    std::string out;
    for (const json& fault : faults) {
      out += text(words(fault, "file"), ": tensor ", base::quoted(words(fault, "tensor")), ", block ",
                  number(fault, "leaf"), " (", number(fault, "size_bytes"), " B at ", number(fault, "offset"),
                  "): not what was loaded first\n");
    }
    out +=
        text(words(verify, "path"), ": ", faults.empty() ? "sound" : count_of(faults.size(), "corrupt block"),
             "; ", number(verify, "leaf_count"), " blocks, ", human_bytes(bytes), " checked in ",
             human_ns(ns), bytes == 0 ? "" : text(", ", rate(bytes, ns), " GB/s"), "\n");
    return Verified{.text = std::move(out), .sound = faults.empty()};
  });
}

Result<std::string> chrome_trace(std::string_view report) {
  TRY_ASSIGN(auto trace, read_report(report, traced));
  return trace;
}

Result<std::string> without_trace(std::string_view report, const std::string& trace_path) {
  return read_report(report, [&](json document) {
    document.erase("trace");
    document["trace_file"] = trace_path;
    return dump(document);
  });
}

std::string error_json(const base::Error& error) {
  return dump({{"error", {{"code", base::code_name(error.code)}, {"message", error.message}}}});
}

}  // namespace tensord::cli
