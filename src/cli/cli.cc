#include "cli/cli.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cerrno>
#include <cstdio>

#include "base/text.h"
#include "cli/completion.h"
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

bool is_among(std::string_view word, int argc, char** argv) {
  return std::any_of(argv + 1, argv + argc, [&](const char* given) { return given == word; });
}

}  // namespace

int cli_main(int argc, char** argv, const std::string& serve_help) {
  const Form form = is_among("--json", argc, argv) ? Form::json : Form::text;
  Words words;
  const std::unique_ptr<CLI::App> program = make_program(words, serve_help);
  if (argc == 1) {
    std::fputs(program->help().c_str(), stderr);
    return kUsage;
  }
  if (std::string_view(argv[1]) == "--complete") {
    return print(completions(*program, {argv + 2, argv + argc})) ? kDone : kFailed;
  }
  std::string problem;
  try {
    program->parse(argc, argv);
  } catch (const CLI::CallForHelp&) {
    return print(program->help()) ? kDone : kFailed;
  } catch (const CLI::CallForVersion& version) {
    return print(text(version.what(), "\n")) ? kDone : kFailed;
  } catch (const CLI::Error& error) {
    problem = error.what();
  }
  const auto named = program->get_subcommands();
  const std::string verb = named.empty() ? "" : named.front()->get_name();
  if (verb.empty() && argv[1][0] != '-') problem = text("there is no verb ", base::quoted(argv[1]));
  if (!problem.empty()) return report_usage(verb, problem, form);

  const Result<Output> output = words.run(words);
  if (!output) return report_error(verb, output.error(), form, exit_status(output.error().code));
  if (!print(form == Form::json ? output->json + "\n" : output->text)) {
    return report_error(verb, base::errno_error("write to standard output", errno), Form::text, kFailed);
  }
  return output->status;
}

}  // namespace tensord::cli
