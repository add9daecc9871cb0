// What can be asked of the engine: selectors, reports, verification.
#include <sys/resource.h>

#include <algorithm>
#include <atomic>
#include <ctime>
#include <utility>

#include "base/check.h"
#include "base/clock.h"
#include "base/mutex.h"
#include "base/text.h"
#include "engine/engine.h"

namespace tensord::engine {

using base::Code;
using base::fail;

const Replica& Engine::replica(uint64_t number) const { return *replicas_.at(number); }

Result<const Replica*> Engine::find(uint64_t number) const {
  const auto found = replicas_.find(number);
  if (found == replicas_.end() || found->second->content == nullptr)
    return fail(Code::not_found, "no replica ", number, " is resident; `tensord ls` lists them");
  return found->second.get();
}

LoadReport* Engine::report_of(uint64_t number) {
  const auto found = std::find_if(reports_.rbegin(), reports_.rend(),
                                  [&](const LoadReport& report) { return report.replica == number; });
  return found == reports_.rend() ? nullptr : &*found;
}

void Engine::note_progress(const Replica& replica, LoadReport& report) {
  const storage::Source& source = replica.load->source();
  report.wall_ns = base::monotonic_ns() - report.begin_ns;
  report.counters = replica.load->counters();
  report.disk_bytes = disk_bytes_read() - report.disk_bytes;
  report.cpu_ns = cpu_time_ns() - report.cpu_ns;
  report.source = source.counters();
  report.read_path = source.read_path();
  const std::vector<std::string> notes = source.notes();  // before those of clients
  report.notes.insert(report.notes.begin(), notes.begin(), notes.end());
  if (std::string problem = replica.pages->problem(); !problem.empty()) {
    report.notes.push_back(std::move(problem));
  }
}

// Of a replica that has not come to a load: how long it has waited for its headers and for memory.
LoadReport Engine::waiting_report(const Replica& replica) {
  const int64_t now_ns = base::monotonic_ns();
  LoadReport report{.replica = replica.number, .path = replica.path(), .state = ReplicaState::waiting};
  report.only = replica.key.only;
  report.begin_ns = replica.asked_ns;
  report.wall_ns = report.index_ns = now_ns - replica.asked_ns;
  if (replica.room_ns == 0) return report;
  const Content& content = *replica.content;
  report.tensor_count = content.index.tensors.size();
  report.whole_tensor_count = (content.whole == nullptr ? content : *content.whole).index.tensors.size();
  report.index_ns = content.index_ns;
  report.memory_ns = now_ns - replica.room_ns;
  return report;
}

void Engine::keep_report(LoadReport report) {
  reports_.push_back(std::move(report));
  if (reports_.size() > kLoadReportCountMax) reports_.pop_front();
}

void Engine::keep_failed(const Replica& replica, const base::Error& error) {
  const auto index_only = [](const Waiter& waiter) { return waiter.index_only; };
  if (std::all_of(replica.waiters.begin(), replica.waiters.end(), index_only)) return;
  LoadReport report = waiting_report(replica);
  report.load = next_load_++;
  report.state = ReplicaState::failed;
  report.error = error;
  keep_report(std::move(report));
}

Result<LoadReport> Engine::explain(uint64_t number) {
  const auto found = replicas_.find(number);
  const Replica* replica = found == replicas_.end() ? nullptr : found->second.get();
  if (replica != nullptr && replica->state <= ReplicaState::waiting) return waiting_report(*replica);
  const LoadReport* kept = report_of(number);
  if (kept == nullptr) return fail(Code::not_found, "the load of replica ", number, " is forgotten");
  LoadReport report = *kept;
  if (replica != nullptr && replica->load) note_progress(*replica, report);
  return report;
}

uint64_t Engine::loaded_bytes() const {
  uint64_t bytes = loaded_bytes_;
  for (const auto& [number, replica] : replicas_) {
    if (replica->load) bytes += replica->load->counters().bytes;
  }
  return bytes;
}

void Engine::note_use(uint64_t number, Use use) {
  LoadReport* report = report_of(number);
  if (report == nullptr) return;
  if (report->uses.size() == kUseCountMax) {
    if (report->uses.front().begin_ns >= report->reopened_ns) return;
    report->uses.erase(report->uses.begin());  // of those before it was opened again
  }
  size_t span_count = report->spans.size();
  for (const Use& earlier : report->uses) span_count += earlier.spans.size();
  if (span_count + use.spans.size() > kSpanCountMax) use.spans.clear();
  if (!use.slower_why.empty()) {
    const std::string note = base::text(use.name, ": copies to GPU memory took a slower way: ", use.slower_why);
    const bool known = std::find(report->notes.begin(), report->notes.end(), note) != report->notes.end();
    if (!known && report->notes.size() < kUseCountMax) report->notes.push_back(note);
  }
  report->uses.push_back(std::move(use));
}

uint64_t disk_bytes_read() {
  rusage used = {};
  ::getrusage(RUSAGE_SELF, &used);
  return static_cast<uint64_t>(used.ru_inblock) * 512;
}

int64_t cpu_time_ns() { return int64_t{std::clock()} * (1'000'000'000 / CLOCKS_PER_SEC); }

// A check of all leaves, in portions that leave the pool's threads to others in between.
struct Verification {
  static constexpr size_t kPortion = 64;  // leaves of up to 1 MiB: some milliseconds

  Verification(const Replica& held, int thread_count) : replica(held), running(thread_count) {}

  const Replica& replica;  // in use: its content, memory and digests stay as they are
  std::atomic<size_t> next{0};
  std::atomic<int> running;
  base::Mutex mutex;
  std::vector<VerifyFault> faults GUARDED_BY(mutex);

  void check_leaf(size_t at) {
    const tensor::Leaf& leaf = replica.content->layout.leaves[at];
    if (tensor::hash({replica.memory.data() + leaf.image_offset, leaf.size_bytes}) == replica.leaves[at]) return;
    const tensor::Index& index = replica.content->index;
    const tensor::Tensor& tensor = index.tensors[leaf.tensor];
    base::MutexLock lock(mutex);
    if (faults.size() == kFaultCountMax) return;
    faults.push_back({index.files[tensor.file].path, tensor.name, leaf.leaf, leaf.file_offset, leaf.size_bytes});
  }

  // False when nothing is left.
  bool check_portion() {
    const size_t begin = next.fetch_add(kPortion);
    const size_t end = std::min(begin + kPortion, replica.leaves.size());
    for (size_t at = begin; at < end; ++at) check_leaf(at);
    return end < replica.leaves.size();
  }

  std::vector<VerifyFault> take_faults() {
    base::MutexLock lock(mutex);
    return std::move(faults);
  }
};

Result<const Replica*> Engine::hold(uint64_t number) {
  const auto found = replicas_.find(number);
  if (found == replicas_.end() || found->second->state < ReplicaState::filling || !found->second->fill)
    return fail(Code::not_found, "there is no replica ", number, "; open the model again");
  ++found->second->use_count;
  return found->second.get();
}

void Engine::let_go(uint64_t number) {
  Replica& replica = *replicas_.at(number);
  --replica.use_count;
  replica.last_used_ns = base::monotonic_ns();
  settle(replica);
}

void Engine::verify(uint64_t number, VerifyDone done) {
  Replica& replica = *replicas_.at(number);
  if (replica.state != ReplicaState::ready) {
    return done(fail(Code::unavailable, "replica ", number, " ", replica.path(), " is not ready to be verified"));
  }
  if (!replica.key.device.empty())
    return done(fail(Code::unsupported, "replica ", number, " lies on ", replica.key.device,
                     "; what it was copied from was checked, and is what can be verified"));
  ++replica.use_count;
  auto job = std::make_shared<Verification>(replica, pool_.thread_count());
  auto finish = [this, job, number, done = std::move(done)] {
    if (cancelling_) {
      done(fail(Code::cancelled, "verify ", job->replica.path(), ": the daemon was stopped"));
    } else {
      done(job->take_faults());
    }
    let_go(number);
  };
  for (int thread = 0; thread < pool_.thread_count(); ++thread) verify_portion(job, finish);
}

void Engine::verify_portion(std::shared_ptr<Verification> job, std::function<void()> finish) {
  pool_.post(this, [this, job, finish] {
    if (!cancelling_ && job->check_portion()) return verify_portion(job, finish);
    if (job->running.fetch_sub(1) == 1) owner_.post(finish);
  });
}

}  // namespace tensord::engine
