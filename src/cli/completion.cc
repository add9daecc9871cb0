#include "cli/completion.h"

#include <CLI/CLI.hpp>
#include <algorithm>

#include "base/check.h"
#include "base/text.h"
#include "cli/verbs.h"

namespace tensord::cli {

using base::text;

namespace {

constexpr std::string_view kBash = R"bash(_tensord() {
  mapfile -t COMPREPLY < <(tensord --complete "${COMP_WORDS[@]:1:COMP_CWORD}")
  if [[ ${COMPREPLY[0]} == '<files>' ]]; then
    compopt -o filenames 2>/dev/null
    mapfile -t COMPREPLY < <(compgen -f -- "${COMP_WORDS[COMP_CWORD]}")
  else
    COMPREPLY=("${COMPREPLY[@]%%$'\t'*}")
  fi
}
complete -F _tensord tensord
)bash";

constexpr std::string_view kZsh = R"zsh(#compdef tensord
_tensord() {
  local -a lines=(${(f)"$(tensord --complete "${(@)words[2,CURRENT]}")"})
  if [[ $lines[1] == '<files>' ]]; then
    _files
  else
    lines=("${(@)lines//:/\\:}")
    lines=("${(@)lines/$'\t'/:}")
    _describe word lines
  fi
}
compdef _tensord tensord
)zsh";

constexpr std::string_view kFish = R"fish(function __tensord_complete
  set -l words (commandline -opc) (commandline -ct)
  set -l lines (tensord --complete $words[2..-1])
  if test "$lines" = '<files>'
    __fish_complete_path (commandline -ct)
  else
    string join \n -- $lines
  end
end
complete -c tensord -f -a '(__tensord_complete)'
)fish";

constexpr std::string_view kFiles = "<files>";
using Candidates = std::vector<std::pair<std::string, std::string>>;  // word, summary

// The words and summaries of the lines "  --flag VALUE   summary" of a help.
void add_flags(const std::string& help, Candidates& found) {
  for (const std::string& line : CLI::detail::split(help, '\n')) {
    const size_t begin = line.find("--");
    if (!line.starts_with("  -") || begin == std::string::npos) continue;
    const size_t end = line.find(' ', begin);
    const size_t summary = line.find("  ", end);
    found.emplace_back(line.substr(begin, end - begin),
                       summary == std::string::npos ? "" : CLI::detail::trim_copy(line.substr(summary)));
  }
}

// What an option or an operand takes: its choices, or files where its name says so.
void add_values(const CLI::Option& option, Candidates& found) {
  const std::string type = option.get_type_name();  // CLI::IsMember makes it "TEXT:{auto,always,never}"
  if (const size_t begin = type.find('{'); begin != std::string::npos) {
    for (const std::string& choice : CLI::detail::split(type.substr(begin + 1, type.size() - begin - 2), ','))
      found.emplace_back(choice, "");
    return;
  }
  const std::string name = option.get_positional() ? option.get_name(true) : option.get_option_text();
  for (const char* path : {"PATH", "REPLICA", "LOAD", "FOLDER", "FILE"}) {
    if (name == path) found.emplace_back(kFiles, "");
  }
}

}  // namespace

std::string_view completion_script(std::string_view shell) {
  CHECK(shell == "bash" || shell == "zsh" || shell == "fish");
  return shell == "bash" ? kBash : shell == "zsh" ? kZsh : kFish;
}

std::string completions(const CLI::App& program, const std::vector<std::string>& words) {
  const std::string word = words.empty() ? "" : words.back();
  const std::string previous = words.size() < 2 ? "" : words[words.size() - 2];
  const auto last = words.empty() ? words.end() : words.end() - 1;
  const auto named = std::find_if(words.begin(), last, [](const auto& one) { return !one.starts_with('-'); });
  Candidates found;
  if (named == last) {
    for (const CLI::App* verb : program.get_subcommands({}))
      found.emplace_back(verb->get_name(), verb->get_description());
    add_flags(program.help(), found);
  } else if (const CLI::App* verb = find_verb(program, *named)) {
    const CLI::Option* option = previous.starts_with('-') ? verb->get_option_no_throw(previous) : nullptr;
    if (option != nullptr && option->get_expected_min() > 0) {
      add_values(*option, found);
    } else if (word.starts_with('-')) {
      add_flags(verb->help(), found);
    } else {
      for (const CLI::Option* operand :
           verb->get_options([](const auto* one) { return one->get_positional(); }))
        add_values(*operand, found);
    }
  }
  std::string out;
  for (const auto& [candidate, summary] : found) {
    if (candidate.starts_with(word) || candidate == kFiles)
      out += text(candidate, summary.empty() ? "" : "\t", summary, "\n");
  }
  return out;
}

}  // namespace tensord::cli
