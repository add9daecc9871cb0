#include <unistd.h>

#include <cstdio>
#include <nlohmann/json.hpp>

#include "base/folders.h"
#include "doctor/doctor.h"
#include "memory/fresh_pages.h"
#include "storage/direct_reader.h"

namespace tensord::doctor {

using nlohmann::json;

namespace {

// As the daemon's segments are given their pages.
std::string problem_of_huge_pages(const memory::Segment& segment) {
  memory::FreshPages pages({&segment, 1}, memory::kHugePageBytes, memory::HugePages::wanted);
  pages.prepare(0, memory::kHugePageBytes);
  return pages.problem();
}

// Why something that the daemon makes use of cannot be had; empty where it works.
json problems() {
  const auto ring = storage::start_uring_reader();
  auto segment = memory::make_segment(memory::kHugePageBytes, ::getuid());
  const std::string no_memory = segment ? "" : segment.error().message;
  return {{"io_uring", ring ? "" : ring.error().message},
          {"memfd", no_memory},
          {"huge_pages", segment ? problem_of_huge_pages(*segment) : no_memory}};
}

base::Result<json> measured(const std::string& path) {
  const std::string state_dir = base::state_folder();
  const uint64_t limit_bytes = cgroup_memory_limit();
  TRY(base::make_folders(state_dir));
  json report = {{"machine", this_machine()}, {"problems", problems()}, {"machine_file", machine_file(state_dir)}};
  report["memory_limit_bytes"] = limit_bytes == UINT64_MAX ? json() : json(limit_bytes);
  TRY_ASSIGN(const Rates rates, measure(path.empty() ? state_dir : path));
  report["bytes_per_s"] = rates.bytes_per_s;
  return report;
}

json error_json(const base::Error& error) {
  return {{"error", {{"code", base::code_name(error.code)}, {"message", error.message}}}};
}

}  // namespace

int measure_main(int argc, char** argv) {
  if (argc > 2) {
    std::fputs("tensord: measure: at most one folder, or file, can be measured\n", stderr);
    return 2;
  }
  const base::Result<json> report = measured(argc == 2 ? argv[1] : "");
  const json document = report ? *report : error_json(report.error());
  std::puts(document.dump(-1, ' ', false, json::error_handler_t::replace).c_str());
  return report && std::fflush(stdout) == 0 ? 0 : 1;
}

}  // namespace tensord::doctor
