// How things are measured: beside a ceiling, in turns.
#pragma once

#include <functional>
#include <span>
#include <vector>

#include "bench/bench.h"

namespace tensord::bench {

// Quantile of unsorted samples, linear between neighbours; 0 without samples.
double quantile(std::vector<double> samples, double at);
double median(const std::vector<double>& samples);
double spread(const std::vector<double>& samples);  // interquartile range / median

// Runs `work` on `thread_count` threads at once, the caller's among them; seconds from the first beginning to the last
// end. Threads are started before the clock.
double run_on_threads(int thread_count, const std::function<void()>& work);

// Does the act once and returns the seconds of the part that counts.
using Act = std::function<Result<double>()>;

struct Race {
  size_t ceiling = 0;  // which of the ceilings was the fastest, by its median; the others do not count
  std::vector<double> ceiling_s;
  std::vector<double> product_s;
  std::vector<double> ratios;  // ceiling_s / product_s, round by round: 1 is as fast as the ceiling
  int try_count = 0;
};

// All once to warm up, then rounds of all in turns, each round beginning with another one. Repeated while the spread of
// the ratios is too wide, as often as the options say; the try with the smallest spread counts.
Result<Race> race(const Options& options, std::span<const Act> ceilings, const Act& product);

// The race as a figure "of ceiling"; `bytes` per act gives the rates.
Figure race_figure(std::string name, const Race& race, double bytes, std::optional<Goal> goal);

}  // namespace tensord::bench
