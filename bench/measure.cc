#include "bench/measure.h"

#include <time.h>

#include <algorithm>
#include <barrier>
#include <cmath>
#include <thread>

#include "base/clock.h"
#include "base/text.h"

namespace tensord::bench {

double quantile(std::vector<double> samples, double at) {
  if (samples.empty()) return 0;
  std::sort(samples.begin(), samples.end());
  const double place = at * static_cast<double>(samples.size() - 1);
  const auto below = static_cast<size_t>(place);
  const size_t above = std::min(below + 1, samples.size() - 1);
  return samples[below] + (samples[above] - samples[below]) * (place - static_cast<double>(below));
}

double median(const std::vector<double>& samples) { return quantile(samples, 0.5); }

double spread(const std::vector<double>& samples) {
  return (quantile(samples, 0.75) - quantile(samples, 0.25)) / median(samples);
}

Stopwatch::Stopwatch(std::vector<pid_t> others)
    : pids_(std::move(others)), begin_cpu_s_(cpu_s()), begin_ns_(base::monotonic_ns()) {}

Sample Stopwatch::read() const {
  const int64_t end_ns = base::monotonic_ns();
  return {static_cast<double>(end_ns - begin_ns_) / 1e9, cpu_s() - begin_cpu_s_};
}

double Stopwatch::cpu_s() const {
  const auto seconds_of = [](clockid_t clock) {
    timespec time{};
    ::clock_gettime(clock, &time);
    return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_nsec) / 1e9;
  };
  double sum = seconds_of(CLOCK_PROCESS_CPUTIME_ID);
  for (const pid_t pid : pids_) {
    clockid_t clock;
    if (::clock_getcpuclockid(pid, &clock) == 0) sum += seconds_of(clock);
  }
  return sum;
}

Sample run_on_threads(int thread_count, const std::function<void()>& work) {
  struct Times {
    int64_t begin_ns = 0, end_ns = 0;
  };
  std::vector<Times> times(thread_count);
  std::barrier all_there(thread_count);
  const auto run = [&](int thread) {
    all_there.arrive_and_wait();
    times[thread].begin_ns = base::monotonic_ns();
    work();
    times[thread].end_ns = base::monotonic_ns();
  };
  std::vector<std::thread> threads;
  for (int thread = 1; thread < thread_count; ++thread) threads.emplace_back(run, thread);
  const Stopwatch stopwatch;
  run(0);
  for (std::thread& thread : threads) thread.join();
  Times all = times[0];
  for (const Times& one : times) {
    all = {std::min(all.begin_ns, one.begin_ns), std::max(all.end_ns, one.end_ns)};
  }
  return {static_cast<double>(all.end_ns - all.begin_ns) / 1e9, stopwatch.read().cpu_s};
}

namespace {

// What one act of a peer may take: nine of them have to fit into the minutes of a suite.
constexpr double kPeerActMaxS = 10;

struct Samples {
  std::vector<double> seconds, cpu_s;
  Status run(const Act& act) {
    TRY_ASSIGN(const Sample sample, act());
    seconds.push_back(sample.seconds);
    cpu_s.push_back(sample.cpu_s);
    return {};
  }
};

Result<Race> race_once(const Options& options, std::span<const Contender> ceilings, const Act& product,
                       std::span<const Contender> peers, std::vector<PeerFigure>& peer_figures) {
  std::vector<Samples> samples(ceilings.size() + 1 + peers.size());  // the product's behind the ceilings'
  const size_t product_at = ceilings.size();
  for (int round = 0; round < options.pair_count; ++round) {
    for (size_t turn = 0; turn < samples.size(); ++turn) {
      const size_t at = (static_cast<size_t>(round) + turn) % samples.size();
      if (at <= product_at) {
        TRY(samples[at].run(at < product_at ? ceilings[at].act : product));
      } else if (PeerFigure& figure = peer_figures[at - product_at - 1]; figure.cannot.empty()) {
        if (const Status done = samples[at].run(peers[at - product_at - 1].act); !done)
          figure.cannot = done.error().message;
      }
    }
  }
  const auto products = samples.begin() + static_cast<std::ptrdiff_t>(product_at);
  const auto best = std::min_element(
      samples.begin(), products, [](const auto& a, const auto& b) { return median(a.seconds) < median(b.seconds); });
  Race race{.product_s = products->seconds, .product_cpu_s = products->cpu_s};
  if (best != products) {
    race.ceiling = ceilings[static_cast<size_t>(best - samples.begin())].name;
    race.ceiling_s = best->seconds;
    race.ceiling_cpu_s = best->cpu_s;
  }
  const auto ratios_to = [&](const std::vector<double>& seconds) {
    std::vector<double> ratios;
    for (size_t round = 0; round < seconds.size(); ++round) ratios.push_back(seconds[round] / race.product_s[round]);
    return ratios;
  };
  race.ratios = ratios_to(race.ceiling_s);
  for (size_t at = 0; at < peers.size(); ++at) {
    if (!peer_figures[at].cannot.empty()) continue;
    const Samples& one = products[static_cast<std::ptrdiff_t>(at) + 1];
    const auto ratios = ratios_to(one.seconds);
    peer_figures[at] = {peers[at].name, median(one.seconds), median(one.cpu_s), median(ratios), spread(ratios), ""};
  }
  return race;
}

}  // namespace

Result<Race> race(const Options& options, std::span<const Contender> ceilings, const Act& product,
                  std::span<const Contender> peers) {
  TRY(product());
  for (const Contender& ceiling : ceilings) TRY(ceiling.act());
  std::vector<PeerFigure> peer_figures;
  for (const Contender& peer : peers) {
    PeerFigure& figure = peer_figures.emplace_back(PeerFigure{.name = peer.name});
    // The first act also imports what the peer needs; the second tells how long one takes.
    for (int time = 0; time < 2 && figure.cannot.empty(); ++time) {
      const auto sample = peer.act();
      if (!sample) {
        if (options.tiny && sample.error().code != base::Code::unsupported) return base::pass_on(sample);
        figure.cannot = sample.error().message;
      } else if (time == 1 && sample->seconds > kPeerActMaxS) {
        figure.cannot = base::text("one act takes ", sample->seconds, " s; the suite has ", kPeerActMaxS);
      }
    }
  }
  Race best;
  int tries = 0;
  do {
    TRY_ASSIGN(Race now,
               race_once(options, ceilings, product, tries == 0 ? peers : std::span<const Contender>(), peer_figures));
    ++tries;
    if (best.product_s.empty() || spread(now.ratios) < spread(best.ratios)) best = std::move(now);
  } while (!best.ratios.empty() && spread(best.ratios) > kSpreadMax && tries < options.try_count);
  best.try_count = tries;
  best.peers = std::move(peer_figures);
  return best;
}

Result<std::vector<Contender>> fastest(std::vector<Contender> all, size_t count, int round_count) {
  std::vector<std::pair<double, size_t>> order;
  std::vector<Samples> samples(all.size());
  for (int round = 0; round < round_count; ++round) {
    for (size_t at = 0; at < all.size(); ++at) TRY(samples[at].run(all[at].act));
  }
  for (size_t at = 0; at < all.size(); ++at) order.emplace_back(median(samples[at].seconds), at);
  std::sort(order.begin(), order.end());
  std::vector<Contender> best;
  for (size_t at = 0; at < std::min(count, all.size()); ++at) best.push_back(all[order[at].second]);
  return best;
}

Figure race_figure(std::string name, const Race& race, double bytes, std::optional<Goal> goal) {
  Figure figure{.name = std::move(name), .unit = "of ceiling", .value = median(race.ratios), .goal = goal};
  figure.spread = spread(race.ratios);
  figure.details = {{"product_gb_s", bytes / median(race.product_s) / 1e9},
                    {"ceiling_gb_s", bytes / median(race.ceiling_s) / 1e9},
                    {"product_cpu_s", median(race.product_cpu_s)},
                    {"ceiling_cpu_s", median(race.ceiling_cpu_s)},
                    {"bytes", bytes},
                    {"tries", race.try_count}};
  figure.samples = race.ratios;
  figure.note = race.ceiling;
  figure.peers = race.peers;
  return figure;
}

Figure time_figure(std::string name, const Race& race, std::optional<Goal> goal) {
  Figure figure = race_figure(std::move(name), race, 0, goal);
  figure.unit = "ms";
  figure.value = median(race.product_s) * 1e3;
  figure.spread = spread(race.product_s);
  figure.samples = race.product_s;
  figure.details.erase("product_gb_s");
  figure.details.erase("ceiling_gb_s");
  figure.details["ceiling_ms"] = median(race.ceiling_s) * 1e3;
  return figure;
}

}  // namespace tensord::bench
