#include "engine/load.h"

#include <unistd.h>

#include <utility>

#include "base/check.h"
#include "base/clock.h"
#include "base/text.h"

namespace tensord::engine {

using base::Code;
using base::MutexLock;

Load::Load(LoadOrder order, std::function<void(LoadResult)> done)
    : content_(std::move(order.content)),
      image_(order.image),
      fill_(order.fill),
      expected_(std::move(order.expected)),
      depth_(order.depth),
      keep_spans_(order.keep_spans),
      done_(std::move(done)),
      leaves_(content_->layout.leaves.size()),
      source_(std::move(order.source)) {
  CHECK(expected_.size() == content_->index.files.size());
  CHECK(depth_ > 0);
}

void Load::start() { pump(); }

void Load::cancel(base::Error reason) {
  fail(std::move(reason));
  source_->cancel();
}

LoadCounters Load::counters() const { return {bytes_.load(), read_ns_.load(), check_ns_.load()}; }

// One thread at a time issues blocks; a source that completes within read() comes back here and returns at once.
void Load::pump() {
  if (pump_calls_.fetch_add(1) > 0) return;
  do {
    while (issue_block()) {
    }
  } while (pump_calls_.fetch_sub(1) > 1);
}

bool Load::issue_block() {
  const auto& blocks = content_->layout.blocks;
  uint32_t number;
  {
    MutexLock lock(mutex_);
    if (finished_) return false;
    if (error_ || next_block_ == blocks.size()) {
      if (in_flight_ > 0) return false;
      finished_ = true;
      number = UINT32_MAX;
    } else {
      if (in_flight_ >= depth_) return false;
      number = next_block_++;
      ++in_flight_;
    }
  }
  if (number == UINT32_MAX) {
    finish();
    return false;
  }
  const tensor::Block& block = blocks[number];
  source_->read({.file = block.file,
                 .offset = block.file_offset,
                 .target = {image_ + block.image_offset, block.size_bytes},
                 .done = [this, number](const Status& status, const storage::ReadTiming& timing) {
                   finish_block(number, status, timing);
                 }});
  return true;
}

void Load::finish_block(uint32_t number, const Status& read, const storage::ReadTiming& timing) {
  const tensor::Block& block = content_->layout.blocks[number];
  Status status = read;
  read_ns_ += timing.end_ns - timing.begin_ns;
  if (status) {
    const int64_t begin_ns = base::monotonic_ns();
    status = check_block(number);
    const int64_t end_ns = base::monotonic_ns();
    check_ns_ += end_ns - begin_ns;
    if (keep_spans_) {
      const auto thread = static_cast<uint32_t>(::gettid());
      keep_span({LoadSpan::Kind::read, thread, number, block.size_bytes, timing.begin_ns, timing.end_ns});
      keep_span({LoadSpan::Kind::check, thread, number, block.size_bytes, begin_ns, end_ns});
    }
  }
  if (status) {
    bytes_ += block.size_bytes;
    fill_->mark_block(number, block.size_bytes);
  } else {
    // A short read of a file that shrank is no corruption: say what really happened.
    const Status unchanged = source_->check_unchanged();
    fail(unchanged ? status.error() : unchanged.error());
    source_->cancel();
  }
  {
    MutexLock lock(mutex_);
    --in_flight_;
  }
  pump();
}

Status Load::check_block(uint32_t number) {
  const tensor::Block& block = content_->layout.blocks[number];
  for (uint32_t at = block.leaf_begin; at < block.leaf_end; ++at) {
    const tensor::Leaf& leaf = content_->layout.leaves[at];
    leaves_[at] = tensor::hash({image_ + leaf.image_offset, leaf.size_bytes});
    const auto& expected = expected_[block.file];
    if (expected.empty()) continue;
    const tensor::Digest& known = expected[at - leaves_of_file(*content_, block.file).first];
    if (known == leaves_[at] || known == tensor::Digest()) continue;
    const tensor::Tensor& tensor = content_->index.tensors[leaf.tensor];
    return base::fail(
        Code::corrupt,
        base::text(content_->index.files[block.file].path, ": tensor ", base::quoted(tensor.name), ", leaf ",
                   leaf.leaf, " (", leaf.size_bytes, " bytes at ", leaf.file_offset,
                   "): the bytes differ from those first read from this file, though its size and mtime "
                   "are the same; restore it, or `touch` it if the change was meant"));
  }
  return {};
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
  if (result.status) result.status = source_->check_unchanged();
  if (result.status) {
    std::vector<std::vector<tensor::Digest>> by_tensor(content_->index.tensors.size());
    for (size_t at = 0; at < leaves_.size(); ++at) {
      by_tensor[content_->layout.leaves[at].tensor].push_back(leaves_[at]);
    }
    std::vector<tensor::Digest> digests;
    for (const auto& leaves : by_tensor) digests.push_back(tensor::tensor_digest(leaves));
    result.artifact_id = tensor::artifact_id(content_->index, digests);
    result.leaves = leaves_;
  }
  result.counters = counters();
  done_(std::move(result));
}

}  // namespace tensord::engine
