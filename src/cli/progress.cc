#include "cli/progress.h"

#include <sys/ioctl.h>
#include <unistd.h>
#include <csignal>
#include <cstdio>

#include <algorithm>

#include "base/bytes.h"
#include "base/clock.h"
#include "base/text.h"
#include "cli/table.h"

namespace tensord::cli {

using base::human_bytes;
using base::text;

namespace {

// Ten lines a second: smooth for the eye, nothing for the machine.
constexpr int64_t kRedrawMs = 100;
constexpr int kBarWidthMax = 40;
constexpr int kBarWidthMin = 8;
constexpr int64_t kMinuteNs = 60'000'000'000;
// Without a byte for so long, that is what there is to say.
constexpr int64_t kIdleNs = 5'000'000'000;

volatile std::sig_atomic_t interrupted = 0;
void note_interrupt(int) { interrupted = 1; }

int terminal_width() {
  winsize size = {};
  if (ioctl(STDERR_FILENO, TIOCGWINSZ, &size) != 0 || size.ws_col < 20) return 80;
  return size.ws_col - 1;  // a full last column would wrap
}

void draw(const FillProgress& progress) {
  static constexpr char kClearToEnd[] = "\x1b[K";
  const bool terminal = isatty(STDERR_FILENO) != 0;
  std::fprintf(stderr, "\r%s%s", progress_line(progress, terminal_width()).c_str(),
               terminal ? kClearToEnd : "");
  std::fflush(stderr);
}

}  // namespace

std::string progress_line(const FillProgress& progress, int width) {
  const double share = progress.total_bytes == 0 ? 1.0
                                                 : static_cast<double>(progress.ready_bytes) /
                                                       static_cast<double>(progress.total_bytes);
  const uint64_t done = progress.ready_bytes - std::min(progress.begin_bytes, progress.ready_bytes);
  const uint64_t left = progress.total_bytes - std::min(progress.ready_bytes, progress.total_bytes);
  std::string numbers = text("  ", static_cast<int>(share * 100), " %  ", human_bytes(progress.ready_bytes),
                             " of ", human_bytes(progress.total_bytes));
  if (progress.idle_ns >= kIdleNs && left > 0) {
    numbers += text("  nothing for ", progress.idle_ns / 1'000'000'000, " s");
  } else if (done > 0 && progress.elapsed_ns > 0) {
    const double bytes_per_ns = static_cast<double>(done) / static_cast<double>(progress.elapsed_ns);
    numbers += text("  ", decimals(bytes_per_ns, 2), " GB/s");
    const auto left_ns = static_cast<int64_t>(static_cast<double>(left) / bytes_per_ns);
    if (left == 0) {
      numbers += text("  in ", human_ns(progress.elapsed_ns));
    } else {
      numbers += text(
          "  ",
          left_ns < kMinuteNs ? decimals(static_cast<double>(left_ns) / 1e9, 1) + " s" : human_ns(left_ns),
          " left");
    }
  }
  const int room = width - static_cast<int>(numbers.size()) - 2;
  if (room < kBarWidthMin) return numbers.substr(2, static_cast<size_t>(width));
  return text("[", bar(share, std::min(room, kBarWidthMax)), "]", numbers);
}

base::Status watch_fill(const client::Model& model, const std::string& mode) {
  const bool shown = mode == "always" || (mode == "auto" && isatty(STDERR_FILENO) != 0);
  interrupted = 0;
  const auto handler_before = std::signal(SIGINT, note_interrupt);
  const int64_t begin_ns = base::monotonic_ns();
  const uint64_t begin_bytes = model.ready_bytes();
  uint64_t last_bytes = begin_bytes;
  int64_t last_ns = begin_ns;
  base::Status waited;
  do {
    waited = model.wait(nullptr, kRedrawMs);
    const uint64_t ready_bytes = model.ready_bytes();
    if (ready_bytes != last_bytes) last_ns = base::monotonic_ns();
    last_bytes = ready_bytes;
    if (shown) {
      draw({.ready_bytes = ready_bytes,
            .total_bytes = model.total_bytes(),
            .begin_bytes = begin_bytes,
            .elapsed_ns = base::monotonic_ns() - begin_ns,
            .idle_ns = base::monotonic_ns() - last_ns});
    }
  } while (!waited && waited.error().code == base::Code::unavailable && model.mapping()->check_daemon() &&
           interrupted == 0);
  std::signal(SIGINT, handler_before);
  if (shown) std::fputc('\n', stderr);
  if (!waited && interrupted != 0) {
    return base::fail(base::Code::cancelled,
                      text("interrupted while ", model.path(), " fills; the daemon goes on filling it"));
  }
  return waited;
}

}  // namespace tensord::cli
