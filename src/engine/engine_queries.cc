// What can be asked of the engine: selectors, reports, verification.
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <charconv>
#include <cstdio>

#include "base/check.h"
#include "base/clock.h"
#include "base/mutex.h"
#include "base/text.h"
#include "engine/engine.h"

namespace tensord::engine {

using base::Code;
using base::fail;

const Replica& Engine::replica(uint64_t number) const { return *replicas_.at(number); }

Result<uint64_t> Engine::find(const std::string& selector) const {
  constexpr size_t kIdDigitsMin = 4;
  uint64_t number = 0;
  const auto [rest, problem] = std::from_chars(selector.data(), selector.data() + selector.size(), number);
  if (problem == std::errc() && rest == selector.data() + selector.size() && replicas_.contains(number))
    return number;
  if (selector == "last" && replicas_.contains(last_opened_)) return last_opened_;
  std::vector<uint64_t> found;
  for (const auto& [at, replica] : replicas_) {
    if (replica->state == ReplicaState::indexing) continue;
    const bool by_path = replica->path == selector;
    const bool by_id = selector.size() >= kIdDigitsMin && replica->artifact &&
                       replica->artifact->to_text().starts_with(selector);
    if (by_path || by_id) found.push_back(at);
  }
  if (found.empty()) {
    return fail(Code::not_found, base::text("no replica of ", base::quoted(selector),
                                            " is resident; `tensord ls` lists them"));
  }
  // Of one path there may be an old and a new replica when its files changed: the newest is meant.
  const bool one_path = std::all_of(found.begin(), found.end(), [&](uint64_t at) {
    return replicas_.at(at)->path == replicas_.at(found.front())->path;
  });
  if (!one_path) {
    return fail(Code::invalid_argument, base::text(base::quoted(selector), " stands for ", found.size(),
                                                   " replicas; use a replica's number from `tensord ls`"));
  }
  return found.back();
}

LoadReport* Engine::report_of(uint64_t number) {
  const auto found = std::find_if(reports_.rbegin(), reports_.rend(),
                                  [&](const LoadReport& report) { return report.replica == number; });
  return found == reports_.rend() ? nullptr : &*found;
}

std::optional<LoadReport> Engine::load_report(uint64_t number) const {
  const LoadReport* found = const_cast<Engine*>(this)->report_of(number);
  if (found == nullptr) return std::nullopt;
  LoadReport report = *found;
  const auto replica = replicas_.find(number);
  if (replica != replicas_.end() && replica->second->load) {
    report.wall_ns = base::monotonic_ns() - report.begin_ns;
    report.counters = replica->second->load->counters();
    report.disk_bytes = disk_bytes_read() - report.disk_bytes;
  }
  return report;
}

std::optional<LoadReport> Engine::last_load_report() const {
  if (reports_.empty()) return std::nullopt;
  return load_report(reports_.back().replica);
}

void Engine::note_use(uint64_t number, Use use) {
  LoadReport* report = report_of(number);
  if (report != nullptr && report->uses.size() < kUseCountMax) report->uses.push_back(std::move(use));
}

uint64_t disk_bytes_read() {
  std::FILE* file = std::fopen("/proc/self/io", "re");
  if (file == nullptr) return 0;
  char line[128];
  unsigned long long bytes = 0;
  while (std::fgets(line, sizeof line, file) != nullptr) {
    if (std::sscanf(line, "read_bytes: %llu", &bytes) == 1) break;
  }
  std::fclose(file);
  return bytes;
}

namespace {

// Shared by the pool's threads; the last one to finish reports.
struct Verification {
  std::shared_ptr<const Content> content;
  const std::byte* image = nullptr;
  const std::vector<tensor::Digest>* leaves = nullptr;
  std::atomic<size_t> next{0};
  std::atomic<int> running{0};
  base::Mutex mutex;
  VerifyReport report GUARDED_BY(mutex);

  void check_leaf(size_t at) {
    const tensor::Leaf& leaf = content->layout.leaves[at];
    if (tensor::hash({image + leaf.image_offset, leaf.size_bytes}) == (*leaves)[at]) return;
    const tensor::Tensor& tensor = content->index.tensors[leaf.tensor];
    base::MutexLock lock(mutex);
    if (report.faults.size() == kFaultCountMax) return;
    report.faults.push_back({content->index.files[tensor.file].path, tensor.name, leaf.leaf,
                             leaf.image_offset - content->layout.file_offsets[tensor.file], leaf.size_bytes});
  }

  // True for the thread that is done last.
  bool run() {
    for (size_t at = next++; at < leaves->size(); at = next++) check_leaf(at);
    return running.fetch_sub(1) == 1;
  }

  VerifyReport take_report() {
    base::MutexLock lock(mutex);
    return std::move(report);
  }
};

}  // namespace

void Engine::verify(uint64_t number, std::function<void(Result<VerifyReport>)> done) {
  Replica& replica = *replicas_.at(number);
  if (replica.state != ReplicaState::ready) {
    return done(fail(Code::unavailable,
                     base::text("replica ", number, " ", replica.path, " is not ready to be verified")));
  }
  ++replica.verify_count;
  auto job = std::make_shared<Verification>();
  job->content = replica.content;
  job->image = replica.memory.data();
  job->leaves = &replica.leaves;
  job->running = pool_.thread_count();
  {
    base::MutexLock lock(job->mutex);
    job->report.replica = number;
    job->report.path = replica.path;
    job->report.artifact = *replica.artifact;
    job->report.leaf_count = replica.leaves.size();
    job->report.bytes = replica.content->index.payload_bytes();
  }
  const int64_t begin_ns = base::monotonic_ns();
  for (int thread = 0; thread < pool_.thread_count(); ++thread) {
    pool_.post(this, [this, job, number, done, begin_ns] {
      if (!job->run()) return;
      owner_.post([this, job, number, done, begin_ns] {
        Replica& verified = *replicas_.at(number);
        --verified.verify_count;
        verified.last_used_ns = base::monotonic_ns();
        VerifyReport report = job->take_report();
        report.ns = base::monotonic_ns() - begin_ns;
        settle(verified);
        done(std::move(report));
        end_drain();
      });
    });
  }
}

}  // namespace tensord::engine
