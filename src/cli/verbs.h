// The verbs: what the command line accepts, its help, and the shells' completions are all read from one program.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "base/result.h"

namespace CLI {
class App;
}

namespace tensord::cli {

using base::Result;
using base::Status;

// cli.h says what they mean.
enum ExitStatus : int { kDone = 0, kFailed = 1, kUsage = 2, kNoDaemon = 3, kCorrupt = 4, kInterrupted = 130 };

// Asks for the daemon where that decides.
ExitStatus exit_status(base::Code code);

// What a verb has to say: `json` is one document; `text` is for people and ends with a line feed.
struct Output {
  std::string json;
  std::string text;
  ExitStatus status = kDone;
};

// What the words said. A verb looks at the fields that its operand and its flags fill.
struct Words {
  Result<Output> (*run)(const Words&) = nullptr;  // the verb's
  std::string operand;                            // the word a verb is about; a verb has at most one
  bool json = false;
  bool wait = false;
  bool pin = false;
  std::string progress = "auto";
  std::vector<std::string> views;
  std::vector<std::string> only;
  std::string trace;
  std::string html;
  double interval_s = 1;
  uint64_t count = 0;      // 0: without end
  std::string serve_help;  // what `serve` accepts is the daemon's to say
};

// The parser of the command line, which fills `words`; it must outlive the parsing.
std::unique_ptr<CLI::App> make_program(Words& words, const std::string& serve_help);

// nullptr when there is none.
const CLI::App* find_verb(const CLI::App& program, const std::string& name);

}  // namespace tensord::cli
