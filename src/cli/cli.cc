#include "cli/cli.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>

#include "base/text.h"
#include "cli/reports.h"
#include "cli/verbs.h"

namespace tensord::cli {

using base::Code;
using base::Error;
using base::text;

namespace {

enum class Form { text, json };

// True when everything reached standard output.
bool print(std::string_view out) {
  return std::fwrite(out.data(), 1, out.size(), stdout) == out.size() && std::fflush(stdout) == 0;
}

int report_error(std::string_view verb, const Error& error, Form form, ExitStatus status) {
  if (form == Form::json) print(error_json(error) + "\n");
  const std::string line = text("tensord: ", verb, verb.empty() ? "" : ": ", error.message, "\n");
  std::fputs(line.c_str(), stderr);
  return status;
}

int report_usage(std::string_view verb, std::string message, Form form) {
  if (const size_t line_feed = message.find('\n'); line_feed != std::string::npos) message.resize(line_feed);
  message += text("; `tensord ", verb.empty() ? "" : text(verb, " "), "--help` says what is accepted");
  return report_error(verb, {.code = Code::invalid_argument, .message = std::move(message)}, form, kUsage);
}

void add_flag(CLI::App& command, const Flag& flag, Words& words) {
  const std::string name(flag.name);
  const std::string summary(flag.summary);
  CLI::Option* option = std::visit(
      [&](auto field) {
        if constexpr (std::is_same_v<decltype(field), bool Words::*>) {
          return command.add_flag(name, words.*field, summary);
        } else {
          // One word a flag: what follows a value is the operand, or the next flag.
          return command.add_option(name, words.*field, summary)->expected(1);
        }
      },
      flag.field);
  if (std::holds_alternative<std::vector<std::string> Words::*>(flag.field)) {
    option->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  }
  if (!flag.choices.empty()) {
    option->check(CLI::IsMember(std::vector<std::string>(flag.choices.begin(), flag.choices.end())));
  }
  if (flag.check != nullptr) {
    option->check(CLI::Validator(
        [check = flag.check](std::string& value) {
          const Status good = check(value);
          return good ? std::string() : good.error().message;
        },
        ""));
  }
}

void add_verb(CLI::App& program, const Verb& verb, Words& words) {
  CLI::App* command = program.add_subcommand(std::string(verb.name), std::string(verb.summary));
  command->set_help_flag();
  for (const Flag& flag : verb.flags) add_flag(*command, flag, words);
  for (const Flag& flag : common_flags()) add_flag(*command, flag, words);
  if (verb.operand.name.empty()) return;
  // Presence is checked after --help had its chance.
  CLI::Option* operand = command->add_option(std::string(verb.operand.name), words.operand);
  if (!verb.operand.choices.empty()) {
    operand->check(
        CLI::IsMember(std::vector<std::string>(verb.operand.choices.begin(), verb.operand.choices.end())));
  }
}

bool is_among(std::string_view word, int argc, char** argv) {
  return std::any_of(argv + 1, argv + argc, [&](const char* given) { return given == word; });
}

struct Parsed {
  const Verb* verb = nullptr;  // nullptr: none is named
  Words words;
  std::string problem;  // empty: the words make sense
};

Parsed parse(int argc, char** argv) {
  Parsed parsed;
  CLI::App program;
  program.set_help_flag();
  for (const Verb& verb : verbs()) add_verb(program, verb, parsed.words);
  try {
    program.parse(argc, argv);
  } catch (const CLI::Error& error) {
    parsed.problem = error.what();
  }
  const auto named = program.get_subcommands();
  if (!named.empty()) parsed.verb = find_verb(named.front()->get_name());
  if (named.size() > 1 && parsed.problem.empty()) parsed.problem = "one verb at a time";
  return parsed;
}

}  // namespace

int cli_main(int argc, char** argv) {
  const Form form = is_among("--json", argc, argv) ? Form::json : Form::text;
  if (argc == 2 && (is_among("--help", argc, argv) || is_among("-h", argc, argv))) {
    return print(help_text()) ? kDone : kFailed;
  }
  if (argc == 1) {
    std::fputs(help_text().c_str(), stderr);
    return kUsage;
  }
  if (std::strcmp(argv[1], "--version") == 0) {
    static char version[] = "version";
    argv[1] = version;
  }
  const Parsed parsed = parse(argc, argv);
  const std::string_view name = parsed.verb == nullptr ? "" : parsed.verb->name;
  if (parsed.verb != nullptr && (is_among("--help", argc, argv) || is_among("-h", argc, argv))) {
    return print(help_text(*parsed.verb)) ? kDone : kFailed;
  }
  if (parsed.verb == nullptr && argv[1][0] != '-') {
    return report_usage("", text("there is no verb ", base::quoted(argv[1])), form);
  }
  if (!parsed.problem.empty()) return report_usage(name, parsed.problem, form);
  if (parsed.verb == nullptr) return report_usage("", "a verb is missing", form);
  if (parsed.verb->run == nullptr) return report_usage(name, text(name, " must be the first word"), form);
  if (parsed.verb->operand.presence == Presence::required && !parsed.verb->operand.name.empty() &&
      parsed.words.operand.empty()) {
    return report_usage(name, text(parsed.verb->operand.name, " is missing"), form);
  }

  const Result<Output> output = parsed.verb->run(parsed.words);
  if (!output) return report_error(name, output.error(), form, exit_status(output.error().code));
  if (!print(form == Form::json ? output->json + "\n" : output->text)) {
    return report_error(name, base::errno_error("write to standard output", errno), Form::text, kFailed);
  }
  return output->status;
}

}  // namespace tensord::cli
