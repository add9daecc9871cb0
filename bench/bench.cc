// Figures: as lines and as JSON.
#include "bench/bench.h"

#include <sys/sysinfo.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <array>
#include <cstdio>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <thread>

#include "base/text.h"
#include "bench/peer.h"

namespace tensord::bench {

using nlohmann::json;

namespace {

std::string first_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

std::string output_of(const std::string& command) {
  const std::unique_ptr<FILE, int (*)(FILE*)> pipe(::popen(command.c_str(), "r"), ::pclose);
  std::array<char, 256> line{};
  if (!pipe || std::fgets(line.data(), line.size(), pipe.get()) == nullptr) return "";
  const std::string text(line.data());
  return text.substr(0, text.find('\n'));
}

std::string processor_name() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with("model name")) return line.substr(line.find(": ") + 2);
  }
  return "unknown";
}

std::string commit() {
  const std::string git = "git -C '" TENSORD_SOURCE_FOLDER "' ";
  const std::string hash = output_of(git + "rev-parse --short=12 HEAD 2>/dev/null");
  if (hash.empty()) return "unknown";
  return hash + (output_of(git + "status --porcelain -uno 2>/dev/null").empty() ? "" : " with changes");
}

json machine() {
  utsname system;
  struct sysinfo memory;
  ::uname(&system);
  ::sysinfo(&memory);
  return {{"processor", processor_name()},
          {"cores", std::thread::hardware_concurrency()},
          {"memory_bytes", static_cast<uint64_t>(memory.totalram) * memory.mem_unit},
          {"kernel", system.release},
          {"huge_pages", first_line("/sys/kernel/mm/transparent_hugepage/enabled")},
          {"huge_pages_shared", first_line("/sys/kernel/mm/transparent_hugepage/shmem_enabled")}};
}

const char* sign(const Goal& goal) { return goal.kind == Goal::Kind::at_least ? ">=" : "<="; }

}  // namespace

bool Figure::meets_goal() const {
  if (!goal) return true;
  return goal->kind == Goal::Kind::at_least ? value >= goal->value : value <= goal->value;
}

std::string unfit_build() {
  if (TENSORD_SANITIZED) return "a build under a sanitizer";
#ifndef __OPTIMIZE__
  return "a build without optimization";
#endif
  return "";
}

Bench::Bench(const Options& options) : options_(options) {}
Bench::~Bench() = default;

void Bench::skip(std::string name, std::string reason) {
  add({.name = std::move(name), .unit = "skipped", .note = std::move(reason)});
}

Result<Peer*> Bench::peer(const std::string& name, int number) {
  std::unique_ptr<Peer>& place = peers_[{name, number}];
  if (!place || place->pid() < 0) {
    TRY_ASSIGN(place, Peer::start(options_.python, name));
    if (!place->version().empty()) versions_[place->package()] = place->version();
  }
  return place.get();
}

Status Bench::drop_peers() {
  for (const auto& [name, peer] : peers_) {
    if (peer && peer->pid() > 0) TRY(peer->ask({{"act", "drop"}}));
  }
  return {};
}

void Bench::begin_case(const char* name) {
  case_name_ = name;
  std::printf("%s\n", name);
}

void Bench::add(Figure figure) {
  std::string line = base::text("  ", figure.name);
  if (figure.unit == "skipped") {
    line += ": skipped: " + figure.note;
  } else if (tiny()) {
    line += ": works";
  } else {
    line.resize(std::max<size_t>(line.size(), 64), ' ');
    line += base::text(" ", figure.value, " ", figure.unit);
    if (figure.spread) line += base::text(", spread ", *figure.spread * 100, " %");
    for (const char* rate :
         {"product_gb_s", "ceiling_gb_s", "product_ms", "ceiling_ms", "product_cpu_s", "ceiling_cpu_s", "p99_ms"}) {
      if (figure.details.contains(rate)) line += base::text("  ", rate, " ", figure.details[rate]);
    }
    if (!figure.note.empty()) line += base::text("  (", figure.note, ")");
    if (figure.is_void()) line += "  VOID: too wide a spread";
    if (figure.goal) line += base::text("  goal ", sign(*figure.goal), " ", figure.goal->value);
    if (!figure.meets_goal()) line += "  MISSED";
  }
  std::puts(line.c_str());
  for (const PeerFigure& peer : figure.peers) {
    line = base::text("    ", peer.name, ": ");
    if (!peer.cannot.empty()) {
      line += "cannot: " + peer.cannot;
    } else {
      line += tiny() ? "works"
                     : base::text(peer.seconds * 1e3, " ms, ", peer.ratio, " x the product's time (spread ",
                                  peer.spread * 100, " %), CPU ", peer.cpu_s * 1e3, " ms",
                                  peer.spread > kSpreadMax ? "  VOID" : "");
    }
    std::puts(line.c_str());
  }
  std::fflush(stdout);
  entries_.push_back({case_name_, std::move(figure)});
}

Status Bench::write_json(const std::string& path) const {
  json figures = json::array();
  for (const auto& [case_name, figure] : entries_) {
    json value = {{"case", case_name},     {"name", figure.name},      {"unit", figure.unit},
                  {"value", figure.value}, {"void", figure.is_void()}, {"details", figure.details}};
    value["spread"] = figure.spread ? json(*figure.spread) : json();
    value["goal"] = figure.goal ? json({{"sign", sign(*figure.goal)}, {"value", figure.goal->value}}) : json();
    value["met"] = figure.goal ? json(figure.meets_goal() && !figure.is_void()) : json();
    if (!figure.note.empty()) value["note"] = figure.note;
    if (!figure.samples.empty()) value["samples"] = figure.samples;
    for (const PeerFigure& peer : figure.peers) {
      json one = {{"name", peer.name}};
      if (peer.cannot.empty()) {
        one.update({{"seconds", peer.seconds}, {"cpu_s", peer.cpu_s}});
        one.update({{"ratio", peer.ratio}, {"spread", peer.spread}, {"void", peer.spread > kSpreadMax}});
      } else {
        one["cannot"] = peer.cannot;
      }
      value["peers"].push_back(std::move(one));
    }
    figures.push_back(std::move(value));
  }
  const json all = {{"machine", machine()},
                    {"commit", commit()},
                    {"build_type", TENSORD_BUILD_TYPE},
                    {"compiler", "gcc " __VERSION__},
                    {"pairs", options_.pair_count},
                    {"figures", figures},
                    {"peers", versions_}};
  std::ofstream file(path);
  file << all.dump(1) << '\n';
  file.close();
  if (!file) return base::fail(base::Code::unavailable, "write " + path);
  return {};
}

}  // namespace tensord::bench
