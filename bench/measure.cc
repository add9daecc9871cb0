#include "bench/measure.h"

#include <algorithm>
#include <barrier>
#include <cmath>
#include <thread>

#include "base/clock.h"

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

double run_on_threads(int thread_count, const std::function<void()>& work) {
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
  run(0);
  for (std::thread& thread : threads) thread.join();
  Times all = times[0];
  for (const Times& one : times) {
    all = {std::min(all.begin_ns, one.begin_ns), std::max(all.end_ns, one.end_ns)};
  }
  return static_cast<double>(all.end_ns - all.begin_ns) / 1e9;
}

namespace {
Result<Race> race_once(const Options& options, std::span<const Act> ceilings, const Act& product) {
  std::vector<std::vector<double>> seconds(ceilings.size() + 1);  // the product's last
  for (size_t round = 0; round < static_cast<size_t>(options.pair_count); ++round) {
    for (size_t turn = 0; turn < seconds.size(); ++turn) {
      const size_t act = (round + turn) % seconds.size();
      TRY_ASSIGN(const double one_s, act < ceilings.size() ? ceilings[act]() : product());
      seconds[act].push_back(one_s);
    }
  }
  const auto faster = [](const auto& a, const auto& b) { return median(a) < median(b); };
  const auto best = std::min_element(seconds.begin(), seconds.end() - 1, faster);
  Race race{.ceiling = static_cast<size_t>(best - seconds.begin()),
            .ceiling_s = *best,
            .product_s = seconds.back()};
  for (size_t round = 0; round < best->size(); ++round) {
    race.ratios.push_back(race.ceiling_s[round] / race.product_s[round]);
  }
  return race;
}
}  // namespace

Result<Race> race(const Options& options, std::span<const Act> ceilings, const Act& product) {
  TRY(product());
  for (const Act& ceiling : ceilings) TRY(ceiling());
  Race best;
  int tries = 0;
  do {
    TRY_ASSIGN(Race now, race_once(options, ceilings, product));
    ++tries;
    if (best.ratios.empty() || spread(now.ratios) < spread(best.ratios)) best = std::move(now);
  } while (spread(best.ratios) > kSpreadMax && tries < options.try_count);
  best.try_count = tries;
  return best;
}

Figure race_figure(std::string name, const Race& race, double bytes, std::optional<Goal> goal) {
  Figure figure{.name = std::move(name), .unit = "of ceiling", .value = median(race.ratios), .goal = goal};
  figure.spread = spread(race.ratios);
  figure.details = {{"product_gb_s", bytes / median(race.product_s) / 1e9},
                    {"ceiling_gb_s", bytes / median(race.ceiling_s) / 1e9},
                    {"bytes", bytes},
                    {"tries", race.try_count}};
  figure.samples = race.ratios;
  return figure;
}

}  // namespace tensord::bench
