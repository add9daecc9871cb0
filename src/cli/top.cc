#include "cli/top.h"

#include <poll.h>
#include <sys/ioctl.h>
#include <termios.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <nlohmann/json.hpp>

#include "base/bytes.h"
#include "base/clock.h"
#include "base/text.h"
#include "cli/reports.h"
#include "cli/table.h"
#include "client/connection.h"

namespace tensord::cli {

using base::Code;
using base::human_bytes;
using base::text;
using nlohmann::json;

namespace {

std::string rate_text(double bytes_per_s) { return decimals(bytes_per_s / 1e9, 2) + " GB/s"; }

json sampled(const json& status, const json& list, const json& before, double now_s) {
  const double passed_s = before.is_null() ? 0 : now_s - before.at("at_s").get<double>();
  const auto per_s = [&](uint64_t now, uint64_t then) {
    return passed_s <= 0 || now < then ? 0.0 : static_cast<double>(now - then) / passed_s;
  };
  std::map<uint64_t, uint64_t> ready_before;
  if (!before.is_null()) {
    for (const json& load : before.at("loads")) ready_before[load.at("replica")] = load.at("ready_bytes");
  }
  json loads = json::array();
  for (const json& replica : list.at("replicas")) {
    if (replica.at("state") != "filling") continue;
    const uint64_t number = replica.at("replica"), ready = replica.at("ready_bytes"),
                   total = replica.at("total_bytes");
    const double filling_s = replica.at("filling_s");
    const auto then = ready_before.find(number);
    const double rate = then != ready_before.end() && passed_s > 0 ? per_s(ready, then->second)
                        : filling_s > 0                            ? static_cast<double>(ready) / filling_s
                                                                   : 0;
    loads.push_back(
        {{"replica", number},
         {"path", replica.at("path")},
         {"ready_bytes", ready},
         {"total_bytes", total},
         {"bytes_per_s", rate},
         {"left_s", rate > 0 ? json(static_cast<double>(total - std::min(ready, total)) / rate) : json()}});
  }
  const uint64_t disk = status.at("disk_bytes"), loaded = status.at("loaded_bytes");
  const auto then = [&](const char* field) {
    return before.is_null() ? UINT64_MAX : before.at(field).get<uint64_t>();
  };
  return {{"at_s", now_s},
          {"pid", status.at("pid")},
          {"memory",
           {{"in_use", status.at("memory").at("in_use")},
            {"kept", status.at("memory").at("kept")},
            {"limit", status.at("limits").at("host_memory")}}},
          {"connections", status.at("connections")},
          {"disk_bytes", disk},
          {"loaded_bytes", loaded},
          {"disk_bytes_per_s", per_s(disk, then("disk_bytes"))},
          {"loaded_bytes_per_s", per_s(loaded, then("loaded_bytes"))},
          {"loads_running", status.at("loads_running")},
          {"loads", std::move(loads)},
          {"replicas", list.at("replicas")}};
}

std::string totals(const json& sample) {
  const json& memory = sample.at("memory");
  return text(sample.at("loads").size(), " filling, ", sample.at("replicas").size(), " replicas, ",
              sample.at("connections").get<uint64_t>(), " connections, memory ",
              human_bytes(memory.at("in_use").get<uint64_t>()), " in use + ",
              human_bytes(memory.at("kept").get<uint64_t>()), " kept of ",
              human_bytes(memory.at("limit").get<uint64_t>()), ", loading ",
              rate_text(sample.at("loaded_bytes_per_s").get<double>()), ", disk ",
              rate_text(sample.at("disk_bytes_per_s").get<double>()));
}

std::string screen(const json& sample, size_t width, size_t height) {
  constexpr int kBarWidth = 20;
  const json& memory = sample.at("memory");
  const auto bytes = [&](const char* field) { return memory.at(field).get<uint64_t>(); };
  const double share =
      static_cast<double>(bytes("in_use")) / static_cast<double>(std::max<uint64_t>(bytes("limit"), 1));
  std::string out = text("tensord, pid ", sample.at("pid").get<int64_t>(), "\nmemory   [",
                         bar(share, kBarWidth), "] ", human_bytes(bytes("in_use")), " in use, ",
                         human_bytes(bytes("kept")), " kept, limit ", human_bytes(bytes("limit")),
                         "\nloading  ", rate_text(sample.at("loaded_bytes_per_s").get<double>()),
                         ", from disk ", rate_text(sample.at("disk_bytes_per_s").get<double>()),
                         "\nclients  ", sample.at("connections").get<uint64_t>(), " connections\n\n");
  if (!sample.at("loads").empty()) {
    Table table({{"load"}, {"", Align::right}, {"rate", Align::right}, {"left", Align::right}, {"path"}});
    for (const json& load : sample.at("loads")) {
      const double done =
          load.at("ready_bytes").get<double>() / std::max(1.0, load.at("total_bytes").get<double>());
      const json& left = load.at("left_s");
      table.add(
          {bar(done, kBarWidth), text(static_cast<int>(done * 100), " %"),
           rate_text(load.at("bytes_per_s").get<double>()),
           left.is_null() ? "-" : human_ns(static_cast<int64_t>(std::min(left.get<double>(), 1e8) * 1e9)),
           load.at("path").get<std::string>()});
    }
    out += table.text() + "\n";
  }
  out += list_text(
             json{{"replicas", sample.at("replicas")}}.dump(-1, ' ', false, json::error_handler_t::replace))
             .value_or("");
  // Whole lines, cut to the screen; control characters in names would break it.
  std::string cut;
  size_t line = 1, column = 0;
  for (const char c : out) {
    if (c == '\n' && line++ == height) break;
    if (c == '\n')
      column = 0;
    else if ((c & 0xc0) != 0x80)
      ++column;
    if (c == '\n' || column <= width) cut += c != '\n' && static_cast<unsigned char>(c) < ' ' ? '?' : c;
  }
  return cut;
}

template <typename Read>
auto read_sample(std::string_view sample, Read read) -> Result<decltype(read(json()))> {
  try {
    return read(json::parse(sample));
  } catch (const json::exception& exception) {
    return base::fail(Code::internal, text("the daemon's answer cannot be read: ", exception.what()));
  }
}

// ---- the terminal

termios terminal_before;
constexpr std::string_view kTakeScreen = "\x1b[?1049h\x1b[?25l";  // another screen, no cursor
constexpr std::string_view kGiveBack = "\x1b[?25h\x1b[?1049l";

// Called by signals as well: only what is allowed there.
void give_back_terminal() {
  const ssize_t written = write(STDOUT_FILENO, kGiveBack.data(), kGiveBack.size());
  if (written >= 0) tcsetattr(STDIN_FILENO, TCSANOW, &terminal_before);
}

// At any moment, also while the daemon does not answer.
void end_by_signal(int number) {
  give_back_terminal();
  _exit(number == SIGINT ? kDone : 128 + number);
}
void note_resize(int) {}  // that it was caught ends the wait for a key

void take_terminal() {
  tcgetattr(STDIN_FILENO, &terminal_before);
  for (const int number : {SIGINT, SIGTERM, SIGHUP, SIGWINCH}) {
    struct sigaction action = {};
    action.sa_handler = number == SIGWINCH ? note_resize : end_by_signal;
    sigaction(number, &action, nullptr);
  }
  termios keys = terminal_before;
  keys.c_lflag &= ~static_cast<tcflag_t>(ICANON | ECHO);
  keys.c_cc[VSUSP] = _POSIX_VDISABLE;  // a stopped program would keep the screen
  tcsetattr(STDIN_FILENO, TCSANOW, &keys);
  std::fwrite(kTakeScreen.data(), 1, kTakeScreen.size(), stdout);
}

bool draw(const std::string& sample) {
  winsize size = {};
  const bool known = ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 && size.ws_row > 0;
  const auto shown = top_screen(sample, known ? size.ws_col : 80, known ? size.ws_row : 24);
  if (!shown) return false;
  std::string out = "\x1b[H";  // over what is there: nothing flickers
  for (const char c : *shown) out += c == '\n' ? std::string("\x1b[K\n") : std::string(1, c);
  out += "\x1b[K\x1b[J";
  return std::fwrite(out.data(), 1, out.size(), stdout) == out.size() && std::fflush(stdout) == 0;
}

// False when `q` was pressed. Draws anew when the screen's size changes.
bool wait_for_key(int64_t end_ns, const std::string& sample, bool on_terminal) {
  pollfd keys = {.fd = on_terminal ? STDIN_FILENO : -1, .events = POLLIN, .revents = 0};
  for (int64_t left_ns = end_ns - base::monotonic_ns(); left_ns > 0;
       left_ns = end_ns - base::monotonic_ns()) {
    const int ready = poll(&keys, 1, static_cast<int>(left_ns / 1'000'000 + 1));
    char key = 0;
    if (ready > 0 && (read(STDIN_FILENO, &key, 1) <= 0 || key == 'q')) return false;
    if (ready < 0 && !draw(sample)) return false;
  }
  return true;
}

Result<std::string> take_sample(const std::string& before) {
  TRY_ASSIGN(const std::string status, client::call(protocol::Verb::status, "", client::Autostart::no));
  TRY_ASSIGN(const std::string list, client::call(protocol::Verb::list, "", client::Autostart::no));
  return top_sample(status, list, before, static_cast<double>(base::monotonic_ns()) / 1e9);
}

// False when nobody reads any more.
bool show(const std::string& sample, bool as_json, bool on_terminal) {
  if (on_terminal) return draw(sample);
  const std::string line = as_json ? sample + "\n" : top_line(sample).value_or("");
  return std::fwrite(line.data(), 1, line.size(), stdout) == line.size() && std::fflush(stdout) == 0;
}

}  // namespace

Result<std::string> top_sample(std::string_view status, std::string_view list, std::string_view before,
                               double now_s) {
  return read_sample(status, [&](const json& told) {
    return sampled(told, json::parse(list), before.empty() ? json() : json::parse(before), now_s)
        .dump(-1, ' ', false, json::error_handler_t::replace);
  });
}

Result<std::string> top_screen(std::string_view sample, size_t width, size_t height) {
  return read_sample(sample, [&](const json& told) { return screen(told, width, height); });
}

Result<std::string> top_line(std::string_view sample) {
  return read_sample(sample, [](const json& told) { return totals(told) + "\n"; });
}

Result<Output> run_top(const Words& words) {
  const bool on_terminal = !words.json && isatty(STDOUT_FILENO) != 0 && isatty(STDIN_FILENO) != 0;
  const auto interval_ns = static_cast<int64_t>(std::strtod(words.interval.c_str(), nullptr) * 1e9);
  const uint64_t count = words.count.empty() ? UINT64_MAX : std::strtoull(words.count.c_str(), nullptr, 10);
  TRY_ASSIGN(std::string sample, take_sample(""));  // no daemon: an error as of any other verb
  const auto pid = [](const std::string& one) { return json::parse(one).at("pid").get<int64_t>(); };
  const int64_t daemon = pid(sample);
  if (on_terminal) take_terminal();
  bool lives = true;
  int64_t next_ns = base::monotonic_ns();
  for (uint64_t shown = 0; show(sample, words.json, on_terminal) && ++shown < count;) {
    next_ns = std::max(next_ns + interval_ns, base::monotonic_ns());
    if (!wait_for_key(next_ns, sample, on_terminal)) break;
    auto taken = take_sample(sample);
    lives = taken && pid(*taken) == daemon;
    if (!lives) break;
    sample = std::move(*taken);
  }
  if (on_terminal) give_back_terminal();
  if (!lives) std::fprintf(stderr, "tensord: top: daemon %lld has ended\n", static_cast<long long>(daemon));
  return Output{.status = lives ? kDone : kNoDaemon};
}

}  // namespace tensord::cli
