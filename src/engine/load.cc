#include "engine/load.h"

#include <unistd.h>

#include <algorithm>
#include <utility>

#include "base/check.h"
#include "base/clock.h"
#include "base/stream_copy.h"
#include "base/text.h"

namespace tensord::engine {

using base::Code;
using base::MutexLock;

namespace {
uint64_t choose_run_bytes(const Content& content, uint32_t thread_count) {
  return std::clamp(content.layout.size_bytes / (uint64_t{4} * thread_count), kRunBytesMin, kRunBytesMax);
}
}  // namespace

// Blocks [first, last) on their way through one read. Belongs to one thread at a time.
class Load::Run {
 public:
  Run(Load& load, uint32_t first, uint32_t last)
      : load_(load),
        blocks_(std::span(load.order_.content->layout.blocks).subspan(first, last - first)),
        leaves_(load.order_.content->layout.leaves),
        first_(first),
        leaf_(blocks_.front().leaf_begin) {}

  const tensor::Block& front() const { return blocks_.front(); }
  uint32_t first() const { return first_; }
  uint32_t last() const { return first_ + static_cast<uint32_t>(blocks_.size()); }
  uint64_t begin() const { return blocks_.front().image_offset; }
  uint64_t size_bytes() const { return blocks_.back().image_offset + blocks_.back().size_bytes - begin(); }
  const Status& status() const { return status_; }

  // Bytes in order, from image offset begin() + at on: those before them are in the image by now.
  void add(uint64_t at, std::span<const std::byte> bytes) {
    mark_until(begin() + at);
    // Reading the clock takes as long as hashing 1 KiB: of small pieces every 16th is timed, but all where spans are kept.
    constexpr uint64_t kLargePiece = 64 << 10, kSampleEvery = 16;
    const bool all = load_.order_.keep_spans || bytes.size() >= kLargePiece;
    const bool timed = all || piece_count_++ % kSampleEvery == 0;
    const int64_t begin_ns = timed ? base::monotonic_ns() : 0;
    hash(begin() + at, bytes);
    if (!timed) return;
    const int64_t took_ns = base::monotonic_ns() - begin_ns;
    load_.check_ns_ += took_ns * static_cast<int64_t>(all ? 1 : kSampleEvery);
    if (load_.order_.keep_spans) note_check(begin_ns, took_ns, bytes.size());
  }

  void mark_rest() {
    mark_until(begin() + size_bytes());
    if (check_.size_bytes > 0) load_.keep_span(std::exchange(check_, {}));
  }

 private:
  // About one span a MiB: hashing that takes turns with reading is drawn as if it had come in one go.
  void note_check(int64_t begin_ns, int64_t took_ns, uint64_t size_bytes) {
    if (check_.size_bytes == 0) {
      check_ = {LoadSpan::Kind::check, static_cast<uint32_t>(::gettid()), first_ + marked_, 0, begin_ns, begin_ns};
    }
    check_.size_bytes += size_bytes;
    check_.end_ns += took_ns;
    if (check_.size_bytes >= tensor::kBlockBytes) load_.keep_span(std::exchange(check_, {}));
  }

  void hash(uint64_t image_at, std::span<const std::byte> bytes) {
    const uint32_t leaf_end = blocks_.back().leaf_end;
    while (!bytes.empty() && leaf_ < leaf_end) {
      const tensor::Leaf& leaf = leaves_[leaf_];
      if (image_at < leaf.image_offset) {  // bytes of no tensor
        const size_t skipped = std::min<uint64_t>(bytes.size(), leaf.image_offset - image_at);
        image_at += skipped;
        bytes = bytes.subspan(skipped);
        continue;
      }
      const uint64_t left = leaf.image_offset + leaf.size_bytes - image_at;
      const auto part = bytes.first(std::min<uint64_t>(bytes.size(), left));
      const bool whole = part.size() == leaf.size_bytes;
      if (!whole) {
        if (image_at == leaf.image_offset) hasher_.begin();
        hasher_.add(part);
      }
      if (part.size() == left) {
        const Status same = load_.check_leaf(leaf_, whole ? tensor::hash(part) : hasher_.end());
        if (!same && status_) status_ = same;
        ++leaf_;
      }
      image_at += part.size();
      bytes = bytes.subspan(part.size());
    }
  }

  // Blocks that end before `image_end` are in the image and hashed. They were read before the file is looked at here: what
  // is marked is what the file was when it was opened.
  void mark_until(uint64_t image_end) {
    const auto is_there = [&] {
      const tensor::Block& block = blocks_[marked_];
      return block.image_offset + block.size_bytes <= image_end;
    };
    if (!status_ || marked_ == blocks_.size() || !is_there()) return;
    status_ = load_.source_->check_unchanged(front().file);
    base::end_streaming();
    while (status_ && marked_ < blocks_.size() && is_there()) {
      const uint64_t block_bytes = blocks_[marked_].size_bytes;
      load_.bytes_ += block_bytes;
      load_.order_.fill->mark_block(first_ + marked_++, block_bytes);
    }
  }

  Load& load_;
  const std::span<const tensor::Block> blocks_;
  const std::vector<tensor::Leaf>& leaves_;
  const uint32_t first_;
  uint32_t leaf_;        // the next one to be finished
  uint32_t marked_ = 0;  // of blocks_
  uint64_t piece_count_ = 0;
  tensor::Hasher hasher_;
  LoadSpan check_;  // under way, where spans are kept
  Status status_;   // of the first leaf that differs
};

Load::Load(LoadOrder order, std::function<void(LoadResult)> done)
    : order_(std::move(order)),
      done_(std::move(done)),
      run_bytes_(choose_run_bytes(*order_.content, order_.thread_count)),
      leaves_(order_.content->layout.leaves.size()),
      issued_(order_.content->layout.blocks.size()),
      source_(std::move(order_.source)) {
  CHECK(order_.expected.empty() || order_.expected.size() == leaves_.size());
  CHECK(order_.thread_count > 0);
}

void Load::start() {
  begin_ns_ = base::monotonic_ns();
  pump();
}

void Load::want(uint32_t first, uint32_t last) {
  constexpr size_t kWantedMax = 1024;  // of a client that asks without end the rest is read in file order
  MutexLock lock(mutex_);
  last = std::min(last, static_cast<uint32_t>(issued_.size()));
  if (first < last && wanted_.size() < kWantedMax) wanted_.emplace_back(first, last);
}

void Load::cancel(base::Error reason) {
  fail(std::move(reason));
  source_->cancel();
}

LoadCounters Load::counters() const {
  const int64_t begin_ns = begin_ns_, end_ns = end_ns_;
  const int64_t until_ns = end_ns != 0 ? end_ns : base::monotonic_ns();
  const int64_t fill_ns = begin_ns == 0 ? 0 : (until_ns - begin_ns) * order_.thread_count;
  const int64_t touch_ns = touch_ns_, check_ns = check_ns_;
  return {bytes_, std::max<int64_t>(fill_ns - touch_ns - check_ns, 0), check_ns, touch_ns};
}

// One thread at a time issues runs; a source that completes within read() comes back here and returns at once.
void Load::pump() {
  if (pump_calls_.fetch_add(1) > 0) return;
  do {
    while (issue_run()) {
    }
  } while (pump_calls_.fetch_sub(1) > 1);
}

// The block to be read next: one that is waited for, else the first in file order.
std::optional<uint32_t> Load::next_block() {
  while (!wanted_.empty()) {
    auto& [first, last] = wanted_.front();
    while (first < last && issued_[first]) ++first;
    if (first < last) return first;
    wanted_.pop_front();
  }
  while (next_block_ < issued_.size() && issued_[next_block_]) ++next_block_;
  if (next_block_ == issued_.size()) return std::nullopt;
  return next_block_;
}

uint32_t Load::run_end(uint32_t first) {
  const auto& blocks = order_.content->layout.blocks;
  uint64_t bytes = blocks[first].size_bytes;
  uint32_t last = first + 1;
  for (; last < blocks.size() && !issued_[last]; ++last) {
    const tensor::Block &before = blocks[last - 1], &block = blocks[last];
    const bool follows = block.file == before.file && block.image_offset == before.image_offset + before.size_bytes &&
                         block.file_offset == before.file_offset + before.size_bytes;
    bytes += block.size_bytes;
    if (!follows || bytes > run_bytes_) break;
  }
  return last;
}

bool Load::issue_run() {
  std::shared_ptr<Run> run;
  {
    MutexLock lock(mutex_);
    if (finished_) return false;
    const auto first = error_ ? std::nullopt : next_block();
    if (first) {
      if (in_flight_bytes_ >= order_.in_flight_bytes_max && in_flight_ >= 2 * order_.thread_count) return false;
      run = std::make_shared<Run>(*this, *first, run_end(*first));
      std::fill(issued_.begin() + run->first(), issued_.begin() + run->last(), true);
      ++in_flight_;
      in_flight_bytes_ += run->size_bytes();
    } else {
      if (in_flight_ > 0) return false;
      finished_ = true;
    }
  }
  if (!run) {
    finish();
    return false;
  }
  source_->read({.file = run->front().file,
                 .offset = run->front().file_offset,
                 .target = {order_.image + run->begin(), run->size_bytes()},
                 .done = [this, run](const Status& status,
                                     const storage::ReadTiming& timing) { finish_run(*run, status, timing); },
                 .begin =
                     [this, run] {
                       if (order_.pages == nullptr) return;
                       const int64_t begin_ns = base::monotonic_ns();
                       order_.pages->prepare(run->begin(), run->size_bytes());
                       touch_ns_ += base::monotonic_ns() - begin_ns;
                     },
                 .piece = [run](uint64_t at, std::span<const std::byte> bytes) { run->add(at, bytes); }});
  return true;
}

void Load::finish_run(Run& run, const Status& read, const storage::ReadTiming& timing) {
  if (read) run.mark_rest();
  const Status& status = read ? run.status() : read;
  if (status) {
    if (order_.keep_spans) {
      keep_span({LoadSpan::Kind::read, static_cast<uint32_t>(::gettid()), run.first(), run.size_bytes(),
                 timing.begin_ns, timing.end_ns});
    }
  } else {
    // A short read of a file that shrank is no corruption: say what really happened.
    const Status unchanged = source_->check_unchanged(run.front().file);
    fail(unchanged ? status.error() : unchanged.error());
    source_->cancel();
  }
  {
    MutexLock lock(mutex_);
    --in_flight_;
    in_flight_bytes_ -= run.size_bytes();
  }
  pump();
}

Status Load::check_leaf(uint32_t at, const tensor::Digest& digest) {
  leaves_[at] = digest;
  if (order_.expected.empty()) return {};
  const tensor::Digest& known = order_.expected[at];
  if (known == digest || known == tensor::Digest()) return {};
  const tensor::Leaf& leaf = order_.content->layout.leaves[at];
  const tensor::Tensor& tensor = order_.content->index.tensors[leaf.tensor];
  return base::fail(Code::corrupt, order_.content->index.files[tensor.file].path, ": tensor ",
                    base::quoted(tensor.name), ", leaf ", leaf.leaf, " (", leaf.size_bytes, " bytes at ",
                    leaf.file_offset,
                    "): the bytes differ from those first read from this file, though its size and "
                    "mtime are the same; restore it, or `touch` it if the change was meant");
}

void Load::fail(base::Error error) {
  MutexLock lock(mutex_);
  if (!error_) error_ = std::move(error);
}

void Load::keep_span(LoadSpan span) {
  MutexLock lock(mutex_);
  if (spans_.size() < kSpanCountMax) spans_.push_back(span);
}

void Load::finish() {
  LoadResult result;
  {
    MutexLock lock(mutex_);
    if (error_) result.status = tl::unexpected(*error_);
    result.spans = std::move(spans_);
  }
  end_ns_ = base::monotonic_ns();
  for (uint32_t file = 0; result.status && file < order_.content->index.files.size(); ++file) {
    result.status = source_->check_unchanged(file);
  }
  if (result.status) {
    std::vector<std::vector<tensor::Digest>> by_tensor(order_.content->index.tensors.size());
    for (size_t at = 0; at < leaves_.size(); ++at) {
      by_tensor[order_.content->layout.leaves[at].tensor].push_back(leaves_[at]);
    }
    std::vector<tensor::Digest> digests;
    for (const auto& leaves : by_tensor) digests.push_back(tensor::tensor_digest(leaves));
    result.artifact_id = tensor::artifact_id(order_.content->index, digests);
    result.leaves = leaves_;
  }
  result.counters = counters();
  done_(std::move(result));
}

}  // namespace tensord::engine
