// The table of verbs. What the command line accepts, its help, and the shells' completions are all read from
// it, so that they cannot differ.
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "base/result.h"

namespace tensord::cli {

using base::Result;
using base::Status;

// cli.h says what they mean.
enum ExitStatus : int { kDone = 0, kFailed = 1, kUsage = 2, kNoDaemon = 3, kCorrupt = 4, kInterrupted = 130 };

// Asks for the daemon where that decides.
ExitStatus exit_status(base::Code code);

// What the words after a verb said. A verb looks at the fields that its operand and its flags fill.
struct Words {
  std::string operand;
  bool json = false;
  bool help = false;
  bool wait = false;
  bool pin = false;
  std::string progress = "auto";
  std::vector<std::string> views;
  std::vector<std::string> only;
  std::string trace;
  std::string html;
  bool quick = false;
  std::string interval = "1";
  std::string count;
};

enum class Completes { nothing, files, choices };

struct Flag {
  std::string_view name;  // "--trace"
  std::string_view summary;
  std::variant<bool Words::*, std::string Words::*, std::vector<std::string> Words::*> field;
  std::string_view value = {};  // how help calls the value; flags into a bool have none
  Completes completes = Completes::nothing;
  std::span<const std::string_view> choices = {};
  Status (*check)(const std::string& value) = nullptr;

  bool takes_value() const { return !std::holds_alternative<bool Words::*>(field); }
};

enum class Presence { required, optional };

// The word a verb is about; a verb has at most one.
struct Operand {
  std::string_view name;  // how help calls it; empty: the verb takes none
  std::string_view summary = {};
  Presence presence = Presence::required;
  Completes completes = Completes::files;
  std::span<const std::string_view> choices = {};
};

// What a verb has to say: `json` is one document; `text` is for people and ends with a line feed.
struct Output {
  std::string json;
  std::string text;
  ExitStatus status = kDone;
};

struct Verb {
  std::string_view name;
  std::string_view summary;
  std::string_view example;
  Operand operand = {};
  std::span<const Flag> flags = {};               // of its own; common_flags() come on top
  Result<Output> (*run)(const Words&) = nullptr;  // nullptr: main() knows the verb
};

std::span<const Verb> verbs();
std::span<const Flag> common_flags();  // every verb has them
const Verb* find_verb(std::string_view name);

// The help of the program, and of a verb.
std::string help_text();
std::string help_text(const Verb& verb);

}  // namespace tensord::cli
