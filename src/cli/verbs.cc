#include "cli/verbs.h"

#include <poll.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <thread>

#include "base/bytes.h"
#include "base/clock.h"
#include "base/fd.h"
#include "base/folders.h"
#include "base/text.h"
#include "cli/completion.h"
#include "cli/progress.h"
#include "cli/reports.h"
#include "cli/show.h"
#include "cli/table.h"
#include "client/connection.h"
#include "client/model.h"
#include "client/version.h"
#include "doctor/doctor.h"
#include "tensor/view.h"

namespace tensord::cli {

using base::Code;
using base::fail;
using base::text;
using client::Autostart;
using client::Model;
using nlohmann::json;
using protocol::Verb::evict;
using protocol::Verb::pin;
using protocol::Verb::unpin;

namespace {

// How long `stop` waits for the daemon to end: it lets running loads and answers come to an end first.
constexpr int kStopTimeoutMs = 30'000;

bool is_made_of(std::string_view word, std::string_view letters) {
  return !word.empty() && word.find_first_not_of(letters) == std::string_view::npos;
}

// Replica numbers, artifact ids (4 digits or more) and `last` are themselves; everything else is a path. A
// file with such a name is written ./1234.
bool is_path(const std::string& word) {
  return word != "last" && !is_made_of(word, "0123456789") &&
         !(word.size() >= 4 && word.size() <= 32 && is_made_of(word, "0123456789abcdef"));
}

// As clients name what they open, so that one checkpoint has one name: symbolic links stay, unless `..` must
// be followed.
std::string absolute(const std::string& word) {
  std::error_code ignored;
  const std::filesystem::path path = std::filesystem::absolute(word, ignored);
  const bool climbs = std::find(path.begin(), path.end(), "..") != path.end();
  std::string whole = climbs ? std::filesystem::weakly_canonical(path, ignored) : path.lexically_normal();
  while (whole.size() > 1 && whole.back() == '/') whole.pop_back();
  return whole;
}

std::string selector_of(const std::string& word) { return is_path(word) ? absolute(word) : word; }

Result<std::string> ask(protocol::Verb verb, const std::string& selector) {
  return client::call(verb, selector, Autostart::no);
}

// A report as it is and as `for_people` says it.
Result<Output> told(Result<std::string> report, Result<std::string> (*for_people)(std::string_view)) {
  if (!report) return base::pass_on(report);
  TRY_ASSIGN(std::string words, for_people(*report));
  return Output{.json = std::move(*report), .text = std::move(words)};
}

Result<Output> run_status(const Words&) { return told(ask(protocol::Verb::status, ""), status_text); }

Result<Output> run_ls(const Words&) { return told(ask(protocol::Verb::list, ""), list_text); }

// By signal: also a daemon that speaks another version of the protocol can be stopped.
Result<Output> run_stop(const Words&) {
  TRY_ASSIGN(const pid_t pid, client::daemon_process());
  const base::Fd process(static_cast<int>(syscall(SYS_pidfd_open, pid, 0)));
  if (!process.valid() || syscall(SYS_pidfd_send_signal, process.get(), SIGTERM, nullptr, 0) != 0) {
    return tl::unexpected(base::errno_error(text("stop daemon ", pid), errno));
  }
  pollfd ended = {.fd = process.get(), .events = POLLIN, .revents = 0};
  if (poll(&ended, 1, kStopTimeoutMs) == 0) {
    return fail(Code::internal, text("daemon ", pid, " was told to stop and still runs after ",
                                     kStopTimeoutMs / 1000, " s; its log says what it waits for"));
  }
  return Output{.json = json{{"pid", pid}}.dump(), .text = text("stopped daemon ", pid, "\n")};
}

// All that is wanted, in memory.
Result<std::shared_ptr<Model>> open_resident(const Words& words) {
  TRY_ASSIGN(std::shared_ptr<Model> model, Model::open({absolute(words.operand)}, {.only = words.only}));
  if (model->resident() == client::Resident::artifact) return model;
  return fail(
      Code::exhausted,
      text("open ", model->path(), ": ", base::human_bytes(model->image_bytes()),
           " cannot be kept in host_memory, which is ", base::human_bytes(model->memory_bytes_max()),
           "; raise host_memory, or take some tensors with --only. Programs can copy out of it all the "
           "same: it is then read in batches (resident=\"view\")"));
}

Result<Output> run_load(const Words& words) {
  TRY_ASSIGN(const std::shared_ptr<Model> model, open_resident(words));
  if (words.pin) TRY(ask(pin, text(model->replica())));
  if (words.wait) TRY(watch_fill(*model, words.progress));
  return told(model->info_json(), load_text);
}

Result<Output> run_show(const Words& words) {
  TRY_ASSIGN(const std::shared_ptr<Model> model,
             Model::open({absolute(words.operand)}, {.index_only = true, .only = words.only}));
  if (words.views.empty()) return show_index(model->index(), model->path());
  return show_views(model->index(), model->path(), words.views);
}

// A path is opened first: that makes it resident, and notices when its files have changed since. What cannot
// be opened any more may still be resident.
Result<std::string> verified(const Words& words) {
  if (!is_path(words.operand)) return ask(protocol::Verb::verify, words.operand);
  const auto model = open_resident(words);
  if (!model) {
    if (model.error().code != Code::not_found) return base::pass_on(model);
    Result<std::string> report = ask(protocol::Verb::verify, absolute(words.operand));
    return report ? std::move(report) : base::pass_on(model);
  }
  TRY(watch_fill(**model, words.progress));
  return ask(protocol::Verb::verify, text((*model)->replica()));
}

Result<Output> run_verify(const Words& words) {
  TRY_ASSIGN(std::string report, verified(words));
  TRY_ASSIGN(Verified result, verify_text(report));
  return Output{
      .json = std::move(report), .text = std::move(result.text), .status = result.sound ? kDone : kCorrupt};
}

Status write_file(const std::string& path, const std::string& content) {
  std::ofstream file(path);
  file << content;
  file.close();
  return file ? Status() : tl::unexpected(base::errno_error(text("write ", path), errno));
}

Result<Output> run_explain(const Words& words) {
  TRY_ASSIGN(std::string report,
             ask(protocol::Verb::explain, selector_of(words.operand.empty() ? "last" : words.operand)));
  TRY_ASSIGN(std::string for_people, explain_text(report));
  if (!words.trace.empty()) {
    TRY_ASSIGN(const std::string trace, chrome_trace(report));
    TRY(write_file(words.trace, trace));
    TRY_ASSIGN(report, without_trace(report, absolute(words.trace)));
    for_people += text("\ntrace in ", words.trace, "; ui.perfetto.dev and chrome://tracing show it\n");
  }
  if (!words.html.empty()) {
    TRY_ASSIGN(const std::string page, explain_page(report));
    TRY(write_file(words.html, page));
    for_people += text("\npicture in ", words.html, "; any browser shows it\n");
  }
  return Output{.json = std::move(report), .text = std::move(for_people)};
}

// Needs no daemon.
Result<Output> run_doctor(const Words& words) {
  static constexpr const char* kVerdicts[] = {"good", "could be better", "missing"};
  const std::string state_dir = base::state_folder();
  TRY(base::make_folders(state_dir));
  if (isatty(STDERR_FILENO) != 0) std::fputs("measuring, this takes 5 to 20 s\n", stderr);
  std::vector<doctor::Check> facts = doctor::look_around();
  TRY_ASSIGN(const doctor::Rates rates, doctor::measure(words.operand.empty() ? state_dir : words.operand));
  const std::string machine = doctor::this_machine(), saved = doctor::machine_file(state_dir);
  TRY(doctor::save_rates(state_dir, machine, rates));
  Table table({{"what"}, {"value", Align::right}, {"verdict"}, {"what to do"}});
  json lines = json::array();
  for (const auto& checks : {doctor::judge(rates), std::move(facts)}) {
    for (const auto& [name, value, verdict, advice] : checks) {
      const char* word = kVerdicts[static_cast<size_t>(verdict)];
      table.add({name, value, word, advice});
      lines.push_back({{"name", name}, {"value", value}, {"verdict", word}, {"advice", advice}});
    }
  }
  const json report = {
      {"machine", machine}, {"bytes_per_s", rates.bytes_per_s}, {"checks", lines}, {"saved", saved}};
  return Output{.json = report.dump(-1, ' ', false, json::error_handler_t::replace),
                .text = text(machine, "\n\n", table.text(), "\nrates in ", saved,
                             ", for `tensord explain`, and for daemons that start from now on\n")};
}

// Over what is there, so that nothing flickers. Lines end at the screen's edge.
void draw(const std::string& screen) {
  winsize size = {};
  const bool known = ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_row > 1;
  int lines_left = known ? size.ws_row - 1 : 23;
  std::string out = "\x1b[?7l\x1b[H";
  for (const char c : screen) {
    if (c == '\n' && lines_left-- == 0) break;
    if (c == '\n') out += "\x1b[K\n";
    if (c != '\n') out += static_cast<unsigned char>(c) < ' ' ? '?' : c;  // a name must not move the cursor
  }
  out += "\x1b[K\x1b[J\x1b[?7h";
  std::fwrite(out.data(), 1, out.size(), stdout);
}

// Prints all but the last look by itself.
Result<Output> run_top(const Words& words) {
  const bool terminal = !words.json && isatty(STDOUT_FILENO) != 0;
  std::string look;
  if (terminal) std::fputs("\x1b[2J", stdout);
  for (uint64_t number = 1;; ++number) {
    TRY_ASSIGN(const std::string status,
               ask(protocol::Verb::status, ""));  // ends it when the daemon has ended
    TRY_ASSIGN(const std::string list, ask(protocol::Verb::list, ""));
    TRY_ASSIGN(look, take_look(status, list, look, static_cast<double>(base::monotonic_ns()) / 1e9));
    TRY_ASSIGN(LookText shown, look_text(look));
    if (terminal) draw(shown.screen);
    if (number == words.count) return Output{std::move(look), terminal ? "\n" : std::move(shown.line)};
    if (!terminal) std::fputs((words.json ? look + "\n" : shown.line).c_str(), stdout);
    if (std::fflush(stdout) != 0) return tl::unexpected(base::errno_error("write the look", errno));
    std::this_thread::sleep_for(std::chrono::duration<double>(words.interval_s));
  }
}

template <protocol::Verb kVerb>
Result<Output> run_on_replica(const Words& words) {
  return told(ask(kVerb, selector_of(words.operand)), [](std::string_view report) {
    return replica_text(kVerb == evict ? "evicted" : kVerb == pin ? "pinned" : "unpinned", report);
  });
}

Result<Output> run_version(const Words&) {
  return Output{.json = json{{"version", client::kVersion}}.dump(),
                .text = text("tensord ", client::kVersion, "\n")};
}

Result<Output> run_completion(const Words& words) {
  std::string script(completion_script(words.operand));
  return Output{.json = json{{"shell", words.operand}, {"script", script}}.dump(), .text = std::move(script)};
}

Result<Output> run_help(const Words& words) {
  Words unused;
  const auto program = make_program(unused, words.serve_help);
  const CLI::App* verb = find_verb(*program, words.operand);
  if (verb == nullptr && !words.operand.empty()) {
    return fail(Code::invalid_argument,
                text("there is no verb ", base::quoted(words.operand), "; `tensord help` lists all"));
  }
  json described = json::array();
  for (const CLI::App* one : program->get_subcommands({})) {
    if (verb != nullptr && verb != one) continue;
    described.push_back(
        {{"name", one->get_name()}, {"summary", one->get_description()}, {"example", one->get_footer()}});
  }
  return Output{.json = json{{"verbs", std::move(described)}}.dump(),
                .text = verb == nullptr ? program->help() : verb->help("tensord")};
}

Result<Output> run_serve(const Words&) {
  return fail(Code::invalid_argument, "serve must be the first word");  // then main() takes it
}

constexpr std::string_view kExitHelp =
    "Exit status: 0 done; 1 it failed; 2 the command line makes no sense; 3 no daemon runs, or it does not\n"
    "answer; 4 the bytes are corrupt or changed; 130 interrupted. Errors are on standard error.";

// The footer of a verb is its example.
class HelpFormatter final : public CLI::Formatter {
 public:
  std::string make_footer(const CLI::App* app) const override {
    const std::string_view kind = app->get_parent() == nullptr ? "" : "Example: ";
    return text(kind, app->get_footer(), "\n\n", kExitHelp, "\n");
  }
};

// One word that a verb takes: its operand, or a flag.
void add_word(CLI::App& verb, Words& words, std::string_view name) {
  const auto add = [&](auto& target, const char* value, const std::string& summary) {
    return verb.add_option(std::string(name), target, summary)->option_text(value);
  };
  const auto add_operand = [&](const char* summary) { return add(words.operand, " ", summary); };
  // Each time with one value: what follows is the operand or the next flag.
  const auto add_many = [&](std::vector<std::string>& values, const char* value, const char* summary) {
    return add(values, value, text(summary, "; may be given many times"))
        ->expected(1)
        ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  };
  const auto is_view = [](const std::string& view) {
    const auto parsed = tensor::parse_view_item(view);
    return parsed ? "" : parsed.error().message;
  };
  if (name == "PATH") add_operand("a .safetensors file, or a folder with a checkpoint")->required();
  if (name == "REPLICA")
    add_operand("a path, an artifact id (4 digits or more), a replica's number")->required();
  if (name == "LOAD") add_operand("a path, an artifact id, a replica's number, or last (the default)");
  if (name == "FOLDER") add_operand("whose disk is measured (default: the state folder), or a file");
  if (name == "SHELL")
    add_operand("bash, zsh or fish")->required()->check(CLI::IsMember({"bash", "zsh", "fish"}));
  if (name == "VERB") add_operand("any of them");
  if (name == "--only") add_many(words.only, "PATTERN", "only tensors of this name, or that match");
  if (name == "--view")
    add_many(words.views, "VIEW", "print the plan that packs such slices")->check(is_view);
  if (name == "--wait") verb.add_flag("--wait", words.wait, "return when every byte is there and checked");
  if (name == "--pin") verb.add_flag("--pin", words.pin, "keep it until it is unpinned");
  if (name == "--progress")
    add(words.progress, "WHEN", "show how far it is: auto (on a terminal), always, never")
        ->check(CLI::IsMember({"auto", "always", "never"}));
  if (name == "--trace")
    add(words.trace, "FILE", "write every read, check and copy to FILE, for chrome://tracing");
  if (name == "--html") add(words.html, "FILE", "draw it in FILE, a page for any browser");
  if (name == "--interval")
    add(words.interval_s, "SECONDS", "time between two looks (1)")->check(CLI::Range(0.001, 1000.0));
  if (name == "--count")
    add(words.count, "COUNT", "end after so many looks")->check(CLI::Range(uint64_t{1}, UINT64_MAX));
  if (name == "--json") verb.add_flag("--json", words.json, "print one JSON document instead of text");
}

struct Verb {
  const char* name;
  const char* summary;
  const char* example;
  Result<Output> (*run)(const Words&);
  const char* words[5] = {};  // its operand and flags, but for --json, which all have
};

constexpr Verb kVerbs[] = {
    {"serve", "run the daemon in the foreground", "tensord serve --host-memory 64GiB", run_serve},
    {"stop", "stop the daemon and wait until it is gone", "tensord stop", run_stop},
    {"status", "say which daemon runs, and its limits", "tensord status --json", run_status},
    {"load",
     "load a checkpoint into memory",
     "tensord load /models/Qwen3-14B --wait --pin",
     run_load,
     {"PATH", "--only", "--wait", "--pin", "--progress"}},
    {"ls", "list what is in memory and who holds it", "tensord ls", run_ls},
    {"show",
     "list the tensors of a checkpoint, or plan a view",
     "tensord show /models/Qwen3-14B --view 'lm_head.weight[:, 0:2560]'",
     run_show,
     {"PATH", "--only", "--view"}},
    {"verify",
     "check every block against its digest",
     "tensord verify /models/Qwen3-14B",
     run_verify,
     {"REPLICA", "--progress"}},
    {"explain",
     "say where the time of a load went",
     "tensord explain last --html load.html",
     run_explain,
     {"LOAD", "--trace", "--html"}},
    {"doctor",
     "measure this machine and say what could be better",
     "tensord doctor /models",
     run_doctor,
     {"FOLDER"}},
    {"top",
     "watch loads, replicas, memory and rates",
     "tensord top --interval 0.5",
     run_top,
     {"--interval", "--count"}},
    {"evict",
     "give back the memory of a replica that nobody holds",
     "tensord evict /models/Qwen3-14B",
     run_on_replica<evict>,
     {"REPLICA"}},
    {"pin", "keep a replica in memory", "tensord pin /models/Qwen3-14B", run_on_replica<pin>, {"REPLICA"}},
    {"unpin",
     "let a replica be evicted again",
     "tensord unpin /models/Qwen3-14B",
     run_on_replica<unpin>,
     {"REPLICA"}},
    {"version", "print the version", "tensord version", run_version},
    {"completion",
     "print a script that completes words in a shell",
     "source <(tensord completion bash)",
     run_completion,
     {"SHELL"}},
    {"help", "print help on a verb", "tensord help load", run_help, {"VERB"}},
};

}  // namespace

std::unique_ptr<CLI::App> make_program(Words& words, const std::string& serve_help) {
  words.serve_help = serve_help;
  auto program = std::make_unique<CLI::App>("tensord: the shared tensor layer of a machine\n", "tensord");
  program->formatter(std::make_shared<HelpFormatter>());
  program->get_formatter()->label("SUBCOMMAND", "VERB");
  program->footer("`tensord VERB --help` tells more, with an example. All but serve have --json.");
  program->set_help_flag("-h,--help", "print this");
  program->set_version_flag("--version", text("tensord ", client::kVersion), "print the version");
  program->require_subcommand(1);
  for (const Verb& verb : kVerbs) {
    CLI::App* app = program->add_subcommand(verb.name, verb.summary)->footer(verb.example)->group("Verbs");
    app->callback([&words, &verb] { words.run = verb.run; });
    for (const char* word : verb.words) {
      if (word != nullptr) add_word(*app, words, word);
    }
    add_word(*app, words, "--json");
  }
  program->get_subcommand("serve")->formatter_fn(
      [=](const CLI::App*, std::string, CLI::AppFormatMode) { return serve_help; });
  return program;
}

const CLI::App* find_verb(const CLI::App& program, const std::string& name) {
  const auto found = program.get_subcommands([&](const CLI::App* verb) { return verb->get_name() == name; });
  return found.empty() ? nullptr : found.front();
}

ExitStatus exit_status(Code code) {
  switch (code) {
    case Code::unavailable:  // also: a replica that is held
      return ask(protocol::Verb::status, "") ? kFailed : kNoDaemon;
    case Code::corrupt:
    case Code::changed:
      return kCorrupt;
    case Code::cancelled:
      return kInterrupted;
    default:
      return kFailed;
  }
}

}  // namespace tensord::cli
