#include "daemon/doctor.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <string_view>

#include "base/clock.h"
#include "base/folders.h"
#include "base/text.h"

namespace tensord::daemon {

using nlohmann::json;

namespace {

constexpr const char* kHelp =
    "tensord doctor: measure this machine, say what could be better, and remember its rates for `explain`\n\n"
    "usage: tensord doctor [flags]\n\n"
    "  --folder FOLDER  whose disk is measured, with a scratch file of 512 MiB (default: the state folder)\n"
    "  --file FILE      read this file instead of a scratch file; its pages leave the page cache\n"
    "  --quick          less of everything, once; the rates are not remembered\n"
    "  --json           print one JSON document instead of text\n"
    "  --help           print this\n\n"
    "The rates are in machine.json in the state folder; a daemon reads them when it starts. Measure when "
    "nothing else\n"
    "runs. It takes about 15 s, and Ctrl-C leaves nothing behind.\n\n"
    "Example: tensord doctor --folder /models\n"
    "Exit status: 0 measured; 1 it failed; 2 the command line makes no sense. Errors are on standard "
    "error.\n";

struct DoctorWords {
  MeasureOptions options;
  bool json = false;
  bool help = false;
  std::string problem;
};

DoctorWords parse(int argc, char** argv) {
  DoctorWords words;
  for (int at = 1; at < argc; ++at) {
    const std::string_view word = argv[at];
    std::string* const value = word == "--folder" ? &words.options.folder
                               : word == "--file" ? &words.options.file
                                                  : nullptr;
    if (value != nullptr && at + 1 < argc)
      *value = argv[++at];
    else if (value != nullptr)
      words.problem = base::text(word, " needs a value");
    else if (word == "--quick")
      words.options.quick = true;
    else if (word == "--json")
      words.json = true;
    else if (word == "--help" || word == "-h")
      words.help = true;
    else
      words.problem =
          base::text("no flag ", base::quoted(word), "; `tensord doctor --help` says what is accepted");
  }
  return words;
}

int complain(const base::Error& error, bool as_json, int status) {
  const json document = {{"error", {{"code", base::code_name(error.code)}, {"message", error.message}}}};
  if (as_json) std::printf("%s\n", document.dump(-1, ' ', false, json::error_handler_t::replace).c_str());
  std::fprintf(stderr, "tensord: doctor: %s\n", error.message.c_str());
  return status;
}

void print_json(const Machine& machine, const Measured& measured, const std::vector<Verdict>& lines,
                const std::string& saved) {
  json rates = json::object(), verdicts = json::array();
  for (const NamedRate& named : named_rates()) rates[named.name] = measured.rates.*named.rate;
  for (const Verdict& line : lines) {
    verdicts.push_back({{"name", line.name},
                        {"value", line.value},
                        {"verdict", grade_name(line.grade)},
                        {"advice", line.advice}});
  }
  const json document = {
      {"machine", {{"cpu", machine.cpu}, {"core_count", machine.core_count}, {"kernel", machine.kernel}}},
      {"rates", rates},
      {"checks", verdicts},
      {"notes", measured.notes},
      {"saved", saved.empty() ? json() : json(saved)}};
  std::printf("%s\n", document.dump(-1, ' ', false, json::error_handler_t::replace).c_str());
}

void print_text(const Machine& machine, const Measured& measured, const std::vector<Verdict>& lines,
                const std::string& saved) {
  std::printf("%s, %d cores, Linux %s\n\n", machine.cpu.c_str(), machine.core_count, machine.kernel.c_str());
  for (const Verdict& line : lines) {
    const bool good = line.grade == Verdict::Grade::good;
    std::printf("%-26s %14s  %s\n", line.name.c_str(), line.value.c_str(), grade_name(line.grade));
    if (!good) std::printf("%26s %14s  -> %s\n", "", "", line.advice.c_str());
  }
  for (const std::string& note : measured.notes) std::printf("\n%s\n", note.c_str());
  if (!saved.empty())
    std::printf("\nThe rates are in %s; the next daemon's `tensord explain` knows them.\n", saved.c_str());
}

}  // namespace

int doctor_main(int argc, char** argv) {
  DoctorWords words = parse(argc, argv);
  if (words.help) return std::fputs(kHelp, stdout) < 0 ? 1 : 0;
  if (!words.problem.empty()) return complain({base::Code::invalid_argument, words.problem}, words.json, 2);
  const std::string state_dir = base::state_folder();
  if (const base::Status made = base::make_folders(state_dir); !made)
    return complain(made.error(), words.json, 1);
  MeasureOptions& options = words.options;
  if (options.folder.empty()) options.folder = state_dir;
  if (isatty(STDERR_FILENO) != 0) {
    options.on_progress = [](double share) {
      std::fprintf(stderr, "\rmeasuring, %d %% \x1b[K", static_cast<int>(share * 100));
    };
  }
  const SystemFacts facts = gather_facts(options.folder);
  options.memory_bytes = std::min(facts.memory_available, std::min(facts.memory_max, facts.memory_high) / 2);
  const auto measured = measure(options);
  if (options.on_progress) std::fputs("\r\x1b[K", stderr);
  if (!measured) return complain(measured.error(), words.json, 1);
  const Machine machine = this_machine();
  std::string saved;
  if (!options.quick) {
    if (const base::Status kept = save_rates(state_dir, machine, measured->rates); !kept) {
      return complain(kept.error(), words.json, 1);
    }
    saved = machine_file(state_dir);
  }
  (words.json ? print_json : print_text)(machine, *measured, verdicts_of(facts, measured->rates), saved);
  return std::fflush(stdout) == 0 ? 0 : 1;
}

}  // namespace tensord::daemon
