#include "cli/reports.h"

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>

#include "base/bytes.h"
#include "base/text.h"
#include "cli/explain_page.h"
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

constexpr size_t kTextWidth = 80;
constexpr int kAxisWidth = 40;

// Breaks at blanks, so that lines have kTextWidth characters at most where words allow it.
std::string wrapped(std::string_view words) {
  std::string out;
  size_t width = 0;
  for (size_t at = 0; at < words.size();) {
    const size_t end = std::min(words.find(' ', at), words.size());
    const std::string_view word = words.substr(at, end - at);
    const bool breaks = width > 0 && width + 1 + shown_width(word) > kTextWidth;
    out += text(out.empty() ? "" : breaks ? "\n" : " ", word);
    width = (breaks || width == 0 ? 0 : width + 1) + shown_width(word);
    at = end + 1;
  }
  return out + "\n";
}

std::string name_of(const json& bar) {
  std::string name = bar.at("name").get<std::string>();
  std::replace(name.begin(), name.end(), '_', ' ');
  return name;
}

// "   ======   ": where on the axis, and in its characters how much of the threads' time the phase had.
std::string axis_bar(const json& bar, int64_t span_ns) {
  const auto column = [&](const char* field) {
    const double share = bar.at(field).get<double>() / static_cast<double>(std::max<int64_t>(span_ns, 1));
    return static_cast<size_t>(std::clamp(share, 0.0, 1.0) * kAxisWidth);
  };
  const double busy = bar.at("busy").get<double>();
  const size_t begin = std::min<size_t>(column("begin_ns"), kAxisWidth - 1);
  const size_t end = std::max(column("end_ns"), begin + 1);
  return std::string(begin, ' ') +
         std::string(end - begin, busy > 0.66   ? '#'
                                  : busy > 0.33 ? '='
                                  : busy > 0.05 ? '-'
                                                : '.') +
         std::string(kAxisWidth - end, ' ');
}

std::string waterfall_text(const json& waterfall) {
  constexpr size_t kLaneCountMax = 8;
  const auto span_ns = waterfall.at("span_ns").get<int64_t>();
  const std::string span = human_ns(span_ns);
  Table table(
      {{""},
       {text("0", std::string(kAxisWidth - 1 - std::min<size_t>(span.size(), kAxisWidth - 1), ' '), span)},
       {"time", Align::right},
       {"GB/s", Align::right}});
  std::string lane = "daemon";
  size_t lane_count = 0;
  for (const json& bar : waterfall.at("bars")) {
    const int64_t begin_ns = bar.at("begin_ns").get<int64_t>(), end_ns = bar.at("end_ns").get<int64_t>();
    const auto ns =
        static_cast<int64_t>(static_cast<double>(end_ns - begin_ns) * bar.at("busy").get<double>());
    if (ns <= 0) continue;
    if (bar.at("lane") != lane) {
      lane = bar.at("lane").get<std::string>();
      if (++lane_count <= kLaneCountMax) table.add({lane.substr(0, 40), "", "", ""});
    }
    if (lane_count > kLaneCountMax) continue;
    table.add({(lane == "daemon" ? "" : "  ") + name_of(bar), axis_bar(bar, span_ns), human_ns(ns),
               rate(bar.at("bytes").get<uint64_t>(), end_ns - begin_ns)});
  }
  if (lane_count > kLaneCountMax) table.add({text("and ", lane_count - kLaneCountMax, " more"), "", "", ""});
  return table.text();
}

std::string origins(const json& report) {
  const auto field = [&](const char* name) { return report.at(name).get<uint64_t>(); };
  const auto disk = field("disk_bytes");
  if (field("cached_bytes") + field("direct_bytes") + field("buffered_bytes") == 0) {
    return disk == 0 ? "no byte came from disk" : text(human_bytes(disk), " came from disk");
  }
  std::string out;
  const auto add = [&](const char* name, const char* how) {
    if (field(name) > 0) out += text(out.empty() ? "" : ", ", human_bytes(field(name)), how);
  };
  add("cached_bytes", " from the page cache");
  add("direct_bytes", " past it (O_DIRECT)");
  add("buffered_bytes", " through it");
  const std::string path = report.at("read_path").get<std::string>();
  return out + (path.empty() ? "" : text("; read by ", path));
}

std::string possible(const json& report) {
  if (!report.at("possible_gb_per_s").is_null()) {
    return text(", of ", decimals(report.at("possible_gb_per_s").get<double>(), 2),
                " GB/s that are possible here (", report.at("possible_by").get<std::string>(), ")");
  }
  return report.at("rates_known").get<bool>() ? "" : "; `tensord doctor` tells what is possible here";
}

std::string explained(const json& report) {
  const json& waterfall = report.at("waterfall");
  const auto bytes = waterfall.at("bytes").get<uint64_t>();
  const auto span_ns = waterfall.at("span_ns").get<int64_t>();
  const auto load = report.at("load").get<uint64_t>();
  const std::string state = report.at("state").get<std::string>();
  const std::string path = report.at("path").get<std::string>();
  std::string out;
  if (waterfall.at("served") == "resident") {
    out = text(path, ": resident since load ", load, "\n") +
          wrapped(text("copied ", human_bytes(bytes), " in ", human_ns(span_ns), ", ", rate(bytes, span_ns),
                       " GB/s", possible(report)));
  } else {
    const auto wall_ns = report.at("wall_ns").get<int64_t>();
    const bool first = report.at("checked_against") == "first_load";
    out = text(load == 0 ? std::string("opening") : text("load ", load), " of ", path, ": ", state, "\n");
    if (bytes > 0) {
      out +=
          wrapped(text(human_bytes(bytes), " in ", human_ns(wall_ns), ", ", rate(bytes, wall_ns), " GB/s by ",
                       count_of(report.at("read_threads").get<uint64_t>(), "thread"), possible(report)));
      out += wrapped(origins(report));
    }
    if (state == "ready") {
      out += first ? "the first load of these files: their digests were recorded\n"
                   : "every byte is what it was at the first load\n";
    }
    if (!report.value("only", json()).is_null())
      out += wrapped(text("only ", tensors_of(report), " tensors: ", only_of(report)));
    for (const json& note : report.at("notes")) out += wrapped(note.get<std::string>());
    if (const json& error = report.at("error"); !error.is_null()) {
      out += text("error: ", error.at("code").get<std::string>(), ": ",
                  error.at("message").get<std::string>(), "\n");
    }
  }
  out += "\n" + waterfall_text(waterfall);
  return out + "\n" +
         wrapped(text("limited by: ", report.at("limited_by").get<std::string>(), ". ",
                      report.at("advice").get<std::string>()));
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

Result<std::string> explain_text(std::string_view report) { return read_report(report, explained); }

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

Result<std::string> chrome_trace(std::string_view report) {
  TRY_ASSIGN(auto trace, read_report(report, traced));
  return trace;
}

Result<std::string> explain_page(std::string_view report) {
  return read_report(report, [](json document) {
    document.erase("trace");  // the page draws the timeline
    std::string page(kExplainPage);
    constexpr std::string_view kMark = "@report@";
    std::string safe;  // within <script>: nothing in it ends the element or begins a comment
    for (const char c : dump(document)) safe += c == '<' ? "\\u003c" : std::string(1, c);
    return page.replace(page.find(kMark), kMark.size(), safe);
  });
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
