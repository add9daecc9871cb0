#include "cli/explain.h"

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

constexpr size_t kTextWidth = 80;
constexpr size_t kAxisWidth = 40;

// The library's exceptions (no JSON, a field missing or of another type) end here.
template <typename Read>
Result<std::string> read_report(std::string_view report, Read read) try {
  return read(json::parse(report));
} catch (const json::exception& exception) {
  return fail(Code::internal, text("the daemon's answer cannot be read: ", exception.what()));
}

std::string dump(const json& document) {
  return document.dump(-1, ' ', false, json::error_handler_t::replace);
}

std::string rate_text(const json& gb_per_s) { return decimals(gb_per_s.get<double>(), 2); }

// Breaks at blanks, so that lines have kTextWidth characters at most where words allow it.
std::string wrapped(std::string_view words) {
  std::string out, line;
  for (size_t at = 0; at < words.size();) {
    const size_t end = std::min(words.find(' ', at), words.size());
    const std::string_view word = words.substr(at, end - at);
    if (!line.empty() && shown_width(line) + 1 + shown_width(word) > kTextWidth)
      out += std::exchange(line, "") + "\n";
    line += (line.empty() ? "" : " ") + std::string(word);
    at = end + 1;
  }
  return out + line + "\n";
}

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
    lane = phase.at("lane").get<std::string>();
    if (begins && ++lane_count <= kLaneCountMax) table.add({lane.substr(0, kLaneWidth), "", "", ""});
    if (lane_count > kLaneCountMax) continue;
    std::string name = phase.at("name").get<std::string>();
    std::replace(name.begin(), name.end(), '_', ' ');
    table.add({(lane_count == 0 ? "" : "  ") + name, axis_bar(phase, static_cast<double>(span_ns)),
               human_ns(phase.at("ns").get<int64_t>()),
               phase.at("bytes") == 0 ? "" : rate_text(phase.at("gb_per_s"))});
  }
  if (lane_count > kLaneCountMax)
    table.add({text("and ", lane_count - kLaneCountMax, " more clients"), "", "", ""});
  return table.text();
}

// Where the bytes came from.
std::string origins(const json& report) {
  std::string out;
  const auto add = [&](const char* name, const char* how) {
    const auto bytes = report.at(name).get<uint64_t>();
    if (bytes > 0) out += text(out.empty() ? "" : ", ", human_bytes(bytes), how);
  };
  add("cached_bytes", " from the page cache");
  add("direct_bytes", text(" by ", report.at("read_path").get<std::string>()).c_str());
  add("buffered_bytes", " from the disk through the page cache");
  return out;
}

std::string rates(const json& report) {
  std::string out = text(human_bytes(report.at("moved_bytes").get<uint64_t>()), " in ",
                         human_ns(report.at("moved_ns").get<int64_t>()), ", ",
                         rate_text(report.at("achieved_gb_per_s")), " GB/s");
  if (const json& possible = report.at("possible_gb_per_s"); !possible.is_null()) {
    out += text(", of ", rate_text(possible), " GB/s that are possible here (",
                report.at("possible_by").get<std::string>(), ")");
  } else if (!report.at("rates_known").get<bool>()) {
    out += "; what is possible here is not known: run `tensord doctor` once";
  }
  return out;
}

std::string load_facts(const json& report) {
  std::string out;
  if (report.at("bytes") != 0) {
    const auto threads = report.at("read_threads").get<uint64_t>();
    out += wrapped(
        text(rates(report), "; ", threads, threads == 1 ? " thread" : " threads", ": ", origins(report)));
  }
  if (report.at("state") == "ready") {
    out += report.at("checked_against") == "recorded"
               ? "every byte is what it was at the first load\n"
               : "the first load of these files: their digests were recorded\n";
  }
  if (const json only = report.value("only", json()); !only.is_null()) {
    std::string names;
    for (const json& name : only) names += (names.empty() ? "" : ", ") + name.get<std::string>();
    out += wrapped(text("only ", report.at("tensor_count").get<uint64_t>(), " of ",
                        report.at("whole_tensor_count").get<uint64_t>(), " tensors: ", names));
  }
  for (const json& note : report.at("notes")) out += wrapped(note.get<std::string>());
  if (const json& error = report.at("error"); !error.is_null()) {
    out += text("error: ", error.at("code").get<std::string>(), ": ", error.at("message").get<std::string>(),
                "\n");
  }
  return out;
}

std::string explained(const json& report) {
  const std::string path = report.at("path").get<std::string>();
  const auto load = report.at("load").get<uint64_t>();
  std::string out;
  if (report.at("served") == "resident") {
    out = text(path, ": resident since load ", load, "\n", wrapped("clients copied " + rates(report)));
  } else {
    out = text(load == 0 ? "opening" : text("load ", load, " of"), " ", path, ": ",
               report.at("state").get<std::string>(), "\n", load_facts(report));
  }
  return text(out, "\n", waterfall(report), "\n",
              wrapped(text("limited by: ", report.at("limited_by").get<std::string>(), ". ",
                           report.at("advice").get<std::string>())));
}

// Events of all phases and spans, a track for each name of `thread`.
std::string traced(const json& report) {
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
    const std::string track =
        phase.at("lane").get<std::string>() + ": " + phase.at("name").get<std::string>();
    add(phase, track, report.at("origin_ns").get<int64_t>(), phase);
  }
  for (const json& span : report.at("trace")) add(span, span.at("thread").get<std::string>(), 0, span);
  return dump({{"displayTimeUnit", "ms"}, {"traceEvents", std::move(events)}});
}

}  // namespace

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
  return read_report(report, [](const json& document) -> Result<std::string> {
    if (!document.value("trace", json()).empty()) return traced(document);
    return fail(
        Code::not_found,
        "the daemon kept no trace of this load: it does so at log level debug; stop it, start it with "
        "`tensord serve --log-level debug`, and load again");
  });
}

Result<std::string> without_trace(std::string_view report, const std::string& trace_path) {
  return read_report(report, [&](json document) {
    document.erase("trace");
    document["trace_file"] = trace_path;
    return dump(document);
  });
}

}  // namespace tensord::cli
