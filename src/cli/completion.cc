#include "cli/completion.h"

#include "base/text.h"
#include "cli/verbs.h"

namespace tensord::cli {

using base::text;

namespace {

// Prints the flags of the daemon, one a line.
constexpr std::string_view kServeFlags =
    "tensord serve --help 2>/dev/null | grep -oE -- '--[a-z][a-z-]*' | sort -u";

std::string joined(std::span<const std::string_view> words) {
  std::string out;
  for (const std::string_view word : words) out += (out.empty() ? "" : " ") + std::string(word);
  return out;
}

std::string verb_names() {
  std::string out;
  for (const Verb& verb : verbs()) out += (out.empty() ? "" : " ") + std::string(verb.name);
  return out;
}

template <typename Visit>
void for_each_flag(const Verb& verb, Visit visit) {
  for (const Flag& flag : verb.flags) visit(flag);
  for (const Flag& flag : common_flags()) visit(flag);
}

// In single quotes, for any of the shells: a quote inside ends the string, is written escaped, and begins it
// again.
std::string shell_quoted(std::string_view words) {
  std::string out = "'";
  for (const char c : words) out += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return out + "'";
}

// ---- bash
// ------------------------------------------------------------------------------------------------------

std::string bash_words(Completes completes, std::span<const std::string_view> choices) {
  if (completes == Completes::files) return "files=1";
  if (completes == Completes::choices) return text("words='", joined(choices), "'");
  return ":";
}

std::string bash_script() {
  std::string values, flags, operands;
  for (const Verb& verb : verbs()) {
    std::string names;
    for_each_flag(verb, [&](const Flag& flag) {
      names += (names.empty() ? "" : " ") + std::string(flag.name);
      if (!flag.takes_value()) return;
      values +=
          text("    ", verb.name, ":", flag.name, ") ", bash_words(flag.completes, flag.choices), " ;;\n");
    });
    const bool daemon = verb.run == nullptr;
    flags += text("    ", verb.name,
                  ":-*) words=", daemon ? text("$(", kServeFlags, ")") : text("'", names, "'"), " ;;\n");
    if (verb.operand.name.empty()) continue;
    operands +=
        text("    ", verb.name, ":*) ", bash_words(verb.operand.completes, verb.operand.choices), " ;;\n");
  }
  return text(
      "_tensord() {\n"
      "  local word=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD-1]} verb= words= files= at\n"
      "  for ((at = 1; at < COMP_CWORD; at++)); do\n"
      "    if [[ ${COMP_WORDS[at]} != -* ]]; then verb=${COMP_WORDS[at]}; break; fi\n"
      "  done\n"
      "  case $verb:$previous in\n",
      values,
      "    *)\n"
      "    case $verb:$word in\n"
      "    :*) words='--help --version ",
      verb_names(), "' ;;\n", flags, operands,
      "    esac ;;\n"
      "  esac\n"
      "  if [[ -n $files ]]; then\n"
      "    compopt -o filenames 2>/dev/null\n"
      "    mapfile -t COMPREPLY < <(compgen -f -- \"$word\")\n"
      "  else\n"
      "    mapfile -t COMPREPLY < <(compgen -W \"$words\" -- \"$word\")\n"
      "  fi\n"
      "}\n"
      "complete -F _tensord tensord\n");
}

// ---- zsh
// -------------------------------------------------------------------------------------------------------

// Square brackets and colons mean something in _arguments.
std::string zsh_escaped(std::string_view words) {
  std::string out;
  for (const char c : words) out += (c == '[' || c == ']' || c == ':' ? "\\" : "") + std::string(1, c);
  return out;
}

std::string zsh_action(std::string_view name, Completes completes,
                       std::span<const std::string_view> choices) {
  if (completes == Completes::files) return text(":", name, ":_files");
  if (completes == Completes::choices) return text(":", name, ":(", joined(choices), ")");
  return text(":", name, ":");
}

std::string zsh_script() {
  std::string described, cases;
  for (const Verb& verb : verbs()) {
    described += text("    ", shell_quoted(text(verb.name, ":", zsh_escaped(verb.summary))), "\n");
    if (verb.run == nullptr) {
      cases += text("    ", verb.name, ") compadd -- $(", kServeFlags, ") ;;\n");
      continue;
    }
    cases += text("    ", verb.name, ") _arguments");
    for_each_flag(verb, [&](const Flag& flag) {
      const std::string action =
          flag.takes_value() ? zsh_action(flag.value, flag.completes, flag.choices) : "";
      cases += " " + shell_quoted(text(flag.name, "[", zsh_escaped(flag.summary), "]", action));
    });
    if (!verb.operand.name.empty()) {
      cases += " " + shell_quoted(
                         "1" + zsh_action(verb.operand.name, verb.operand.completes, verb.operand.choices));
    }
    cases += " ;;\n";
  }
  return text(
      "#compdef tensord\n"
      "_tensord() {\n"
      "  local -a verbs=(\n",
      described,
      "  )\n"
      "  if ((CURRENT == 2)); then\n"
      "    _describe verb verbs\n"
      "    return\n"
      "  fi\n"
      "  local verb=$words[2]\n"
      "  shift words\n"
      "  ((CURRENT--))\n"
      "  case $verb in\n",
      cases,
      "  esac\n"
      "}\n"
      "compdef _tensord tensord\n");
}

// ---- fish
// ------------------------------------------------------------------------------------------------------

std::string fish_values(Completes completes, std::span<const std::string_view> choices) {
  if (completes == Completes::files) return " -F";
  if (completes == Completes::choices) return text(" -f -a ", shell_quoted(joined(choices)));
  return " -f";
}

std::string fish_script() {
  std::string out = "complete -c tensord -f\n";
  for (const Verb& verb : verbs()) {
    out += text("complete -c tensord -n __fish_use_subcommand -a ", verb.name, " -d ",
                shell_quoted(verb.summary), "\n");
    const std::string seen = text("complete -c tensord -n '__fish_seen_subcommand_from ", verb.name, "'");
    if (verb.run == nullptr) {
      out += text(seen, " -a \"(", kServeFlags, ")\"\n");
      continue;
    }
    for_each_flag(verb, [&](const Flag& flag) {
      out += text(seen, " -l ", flag.name.substr(2), " -d ", shell_quoted(flag.summary));
      if (flag.takes_value()) out += " -r" + fish_values(flag.completes, flag.choices);
      out += "\n";
    });
    if (!verb.operand.name.empty())
      out += seen + fish_values(verb.operand.completes, verb.operand.choices) + "\n";
  }
  return out;
}

}  // namespace

base::Result<std::string> completion_script(std::string_view shell) {
  if (shell == "bash") return bash_script();
  if (shell == "zsh") return zsh_script();
  if (shell == "fish") return fish_script();
  return base::fail(base::Code::invalid_argument, text("there is no completion for ", base::quoted(shell),
                                                       "; there is for bash, zsh and fish"));
}

}  // namespace tensord::cli
