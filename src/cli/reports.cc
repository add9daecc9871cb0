#include "cli/reports.h"

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>

#include "base/bytes.h"
#include "base/text.h"
#include "cli/explain_page.h"
#include "cli/progress.h"
#include "cli/table.h"

namespace tensord::cli {

using base::Code;
using base::fail;
using base::human_bytes;
using base::text;
using nlohmann::json;

namespace {

constexpr size_t kAxisWidth = 40;

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
  for (const json& name : value.at("only")) out += (out.empty() ? "" : ", ") + name.get<std::string>();
  return out;
}

std::string state_of(const json& replica) {
  const std::string state = words(replica, "state");
  const auto total = replica.value("total_bytes", uint64_t{0});
  if (state != "filling" || total == 0) return state;
  return text(state, " ", replica.value("ready_bytes", uint64_t{0}) * 100 / total, " %");
}

std::string rate_text(const json& gb_per_s) { return decimals(gb_per_s.get<double>(), 2); }

// "   ======   ": where on the axis, and by its character how busy the phase kept its threads there.
std::string axis_bar(const json& phase, double span_ns) {
  const auto begin_ns = phase.at("begin_ns").get<double>(), end_ns = phase.at("end_ns").get<double>();
  const auto column = [&](double ns) {
    return static_cast<size_t>(std::clamp(ns / std::max(span_ns, 1.0), 0.0, 1.0) * kAxisWidth);
  };
  const double busy = phase.at("ns").get<double>() / std::max(end_ns - begin_ns, 1.0);
  const char character = busy > 0.66 ? '#' : busy > 0.33 ? '=' : busy > 0.05 ? '-' : '.';
  const size_t begin = std::min(column(begin_ns), kAxisWidth - 1);
  return std::string(begin, ' ') + std::string(std::max(column(end_ns), begin + 1) - begin, character);
}

std::string waterfall(const json& report) {
  constexpr size_t kLaneCountMax = 8, kLaneWidth = 40;
  const auto span_ns = report.at("span_ns").get<int64_t>();
  const std::string span = human_ns(span_ns);
  const std::string axis =
      "0" + std::string(kAxisWidth - 1 - std::min(span.size(), kAxisWidth - 1), ' ') + span;
  Table table({{"phase"}, {axis}, {"time", Align::right}, {"GB/s", Align::right}});
  std::string lane = "daemon";
  size_t lane_count = 0;
  for (const json& phase : report.at("phases")) {
    if (phase.at("thread_ns").get<int64_t>() <= 0) continue;
    const bool begins = phase.at("lane") != lane;
    lane = words(phase, "lane");
    if (begins && ++lane_count <= kLaneCountMax) table.add({lane.substr(0, kLaneWidth), "", "", ""});
    if (lane_count > kLaneCountMax) continue;
    std::string name = words(phase, "name");
    std::replace(name.begin(), name.end(), '_', ' ');
    table.add({(lane_count == 0 ? "" : "  ") + name, axis_bar(phase, static_cast<double>(span_ns)),
               human_ns(phase.at("ns").get<int64_t>()),
               phase.at("bytes") == 0 ? "" : rate_text(phase.at("gb_per_s"))});
  }
  if (lane_count > kLaneCountMax)
    table.add({text("and ", lane_count - kLaneCountMax, " more clients"), "", "", ""});
  return table.text();
}

std::string rates(const json& report) {
  const auto field = [&](const char* name) { return report.at(name).get<uint64_t>(); };
  std::string out =
      text(human_bytes(field("moved_bytes")), " in ", human_ns(report.at("moved_ns").get<int64_t>()), ", ",
           rate_text(report.at("achieved_gb_per_s")), " GB/s");
  if (const json& possible = report.at("possible_gb_per_s"); !possible.is_null())
    out += text(", of ", rate_text(possible), " GB/s that are possible here (", words(report, "possible_by"),
                ")");
  out += report.at("rates_known").get<bool>()
             ? "\n"
             : "\nwhat is possible here is not known: run `tensord doctor` once\n";
  if (report.at("served") == "resident") return out;
  std::string from;
  const auto add = [&](const char* name, const std::string& how) {
    if (field(name) > 0) from += text(from.empty() ? "" : ", ", human_bytes(field(name)), " ", how);
  };
  add("cached_bytes", "from the page cache");
  add("direct_bytes", "by " + words(report, "read_path"));
  add("buffered_bytes", "through the page cache");
  return text(out, "threads: ", field("read_threads"), "; ", from, "\n");
}

std::string explained(const json& report) {
  const bool resident = report.at("served") == "resident";
  const std::string state = words(report, "state");
  const auto load = number(report, "load");
  std::string out = text(load == 0 ? "the load" : text("load ", load), " of ", words(report, "path"), ": ",
                         resident ? "resident; what clients copied since it was opened last" : state, "\n");
  if (report.at("moved_bytes") != 0) out += rates(report);
  if (state == "ready" && !resident) {
    out += report.at("checked_against") == "recorded"
               ? "every byte is what it was at the first load\n"
               : "the first load of these files: their digests were recorded\n";
  }
  if (!report.value("only", json()).is_null())
    out += text("only ", tensors_of(report), " tensors: ", only_of(report), "\n");
  for (const json& note : report.at("notes")) out += note.get<std::string>() + "\n";
  if (const json& error = report.at("error"); !error.is_null())
    out += text("error: ", words(error, "code"), ": ", words(error, "message"), "\n");
  return text(out, "\n", waterfall(report), "\nlimited by: ", words(report, "limited_by"), "\n",
              words(report, "advice"), "\n");
}

// Events of all phases and spans, a track for each name of `thread`.
Result<std::string> traced(const json& report) {
  if (report.value("trace", json()).empty()) {
    return fail(
        Code::not_found,
        "the daemon kept no trace of this load: it does so at log level debug; stop it, start it with "
        "`tensord serve --log-level debug`, and load again");
  }
  json events = json::array();
  std::map<std::string, int> tracks;
  const auto add = [&](const json& span, const std::string& thread, int64_t origin_ns, json details) {
    const auto [track, added] = tracks.try_emplace(thread, static_cast<int>(tracks.size()) + 1);
    if (added) {
      events.push_back({{"name", "thread_name"},
                        {"ph", "M"},
                        {"pid", 1},
                        {"tid", track->second},
                        {"args", {{"name", thread}}}});
    }
    const auto begin_ns = span.at("begin_ns").get<int64_t>(), end_ns = span.at("end_ns").get<int64_t>();
    for (const char* told : {"name", "thread", "begin_ns", "end_ns"}) details.erase(told);
    // "X" is a complete event; its times are microseconds.
    events.push_back({{"name", span.at("name")},
                      {"ph", "X"},
                      {"pid", 1},
                      {"tid", track->second},
                      {"ts", static_cast<double>(origin_ns + begin_ns) / 1e3},
                      {"dur", static_cast<double>(end_ns - begin_ns) / 1e3},
                      {"args", std::move(details)}});
  };
  for (const json& phase : report.at("phases")) {
    if (phase.at("thread_ns").get<int64_t>() <= 0) continue;
    const std::string track = words(phase, "lane") + ": " + words(phase, "name");
    add(phase, track, report.at("origin_ns").get<int64_t>(), phase);
  }
  for (const json& span : report.at("trace")) add(span, words(span, "thread"), 0, span);
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

Result<std::string> explain_text(std::string_view report) { return read_report(report, explained); }

Result<std::string> explain_page(std::string_view report) {
  return read_report(report, [](json document) {
    document.erase("trace");
    std::string safe;  // within <script>: nothing in it ends the element or begins a comment
    for (const char c : dump(document)) safe += c == '<' ? "\\u003c" : std::string(1, c);
    constexpr std::string_view kMark = "@report@";
    std::string page(kExplainPage);
    return page.replace(page.find(kMark), kMark.size(), safe);
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

Result<std::string> take_look(std::string_view status, std::string_view list, std::string_view before,
                              double now_s) {
  return read_report(status, [&](json look) {
    const json last = before.empty() ? look : json::parse(before);
    const double passed_s = before.empty() ? 0 : now_s - last.at("at_s").get<double>();
    const auto per_s = [&](const json& now, const json& then) {
      const auto bytes = now.get<double>() - then.get<double>();
      return passed_s > 0 && bytes > 0 ? bytes / passed_s : 0.0;
    };
    for (const std::string name : {"loaded_bytes", "disk_bytes"})
      look[name + "_per_s"] = per_s(look.at(name), last.at(name));
    look["at_s"] = now_s;
    look["replicas"] = json::parse(list).at("replicas");
    for (json& replica : look["replicas"]) {
      if (replica.at("state") != "filling" || before.empty()) continue;
      for (const json& one : last.at("replicas")) {
        if (one.at("replica") == replica.at("replica") && one.contains("ready_bytes"))
          replica["bytes_per_s"] = per_s(replica.at("ready_bytes"), one.at("ready_bytes"));
      }
    }
    return dump(look);
  });
}

Result<LookText> look_text(std::string_view look) {
  TRY_ASSIGN(const std::string list, list_text(look));
  return read_report(look, [&](const json& told) {
    const json& memory = told.at("memory");
    const auto bytes = [](const json& value) { return human_bytes(value.get<uint64_t>()); };
    const auto rate = [&](const char* name) {
      return decimals(told.at(name).get<double>() / 1e9, 2) + " GB/s";
    };
    LookText out;
    out.line =
        text(count_of(told.at("replicas").size(), "replica"), ", ",
             count_of(number(told, "loads_running"), "load"), ", ",
             count_of(number(told, "connections"), "client"), ", memory ", bytes(memory.at("in_use")),
             " in use + ", bytes(memory.at("kept")), " kept of ", bytes(told.at("limits").at("host_memory")),
             ", loading ", rate("loaded_bytes_per_s"), ", disk ", rate("disk_bytes_per_s"), "\n");
    out.screen = out.line + "\n";
    for (const json& replica : told.at("replicas")) {
      if (replica.at("state") != "filling") continue;
      constexpr int kWidth = 90;
      const auto ready = number(replica, "ready_bytes");
      const auto second = std::min(static_cast<uint64_t>(replica.value("bytes_per_s", 0.0)), ready);
      const FillProgress progress{ready, number(replica, "total_bytes"), ready - second, 1'000'000'000};
      out.screen += progress_line(progress, kWidth) + "  " + words(replica, "path") + "\n";
    }
    out.screen += "\n" + list;
    return out;
  });
}

std::string error_json(const base::Error& error) {
  return dump({{"error", {{"code", base::code_name(error.code)}, {"message", error.message}}}});
}

}  // namespace tensord::cli
