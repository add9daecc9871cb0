// tensord in C++: tensord.h with owners, spans and results. Header only; needs C++20 and libtensord.so.
//
//   auto model = tensord::Model::open({"/models/Qwen3-14B"});
//   if (!model) return complain(model.error().message);
//   std::vector<uint16_t> half(5120 * 8704);
//   auto done = model->load_into({{.name = "model.layers.0.mlp.down_proj.weight",
//                                  .index = {tensord::all, tensord::slice(0, 8704)},
//                                  .target = {half.data(), TENSORD_BF16, {5120, 8704}}}});
//
// Nothing here throws, but for std::bad_alloc from the containers. Every call that can fail returns a Result or a
// Status. Objects may be used from several threads at once; moving and destroying them is for one thread alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "tensord/tensord.h"

namespace tensord {

// ---- results -----------------------------------------------------------------------------------------------

struct Error {
  tensord_code code = TENSORD_INTERNAL;
  std::string message;        // what was tried, on what, why it failed, what to do
  bool target_dirty = false;  // load_into may have written into its targets before it failed
};

// The error of the call of the C ABI that just failed on this thread.
inline Error last_error(int code) {
  return {static_cast<tensord_code>(code), tensord_error_message(), tensord_error_target_dirty() != 0};
}

// A value, or why there is none. Looking at the one that is not there ends the program.
template <typename T>
class [[nodiscard]] Result {
 public:
  Result(T value) : state_(std::in_place_index<0>, std::move(value)) {}
  Result(Error error) : state_(std::in_place_index<1>, std::move(error)) {}

  bool ok() const { return state_.index() == 0; }
  explicit operator bool() const { return ok(); }
  T& operator*() { return *present(std::get_if<0>(&state_)); }
  const T& operator*() const { return *present(std::get_if<0>(&state_)); }
  T* operator->() { return present(std::get_if<0>(&state_)); }
  const T* operator->() const { return present(std::get_if<0>(&state_)); }
  const Error& error() const { return *present(std::get_if<1>(&state_)); }

 private:
  template <typename U>
  static U* present(U* part) {
    if (part == nullptr) std::abort();
    return part;
  }
  std::variant<T, Error> state_;
};

// What a call of the C ABI gave, or its error.
template <typename T>
Result<T> result_of(int code, T value) {
  if (code != TENSORD_OK) return last_error(code);
  return value;
}

// Done, or why not.
using Status = Result<std::monostate>;
inline Status status_of(int code) { return result_of(code, std::monostate{}); }

// ---- slices ------------------------------------------------------------------------------------------------

// One item of an index, with numpy's meaning. A number picks one element and removes its dimension.
struct IndexItem {
  tensord_index_item item{};
  constexpr IndexItem(int64_t number) : item{TENSORD_INTEGER, 0, number, 0, 0} {}
  constexpr explicit IndexItem(const tensord_index_item& raw) : item(raw) {}
};

inline constexpr IndexItem all{tensord_index_item{TENSORD_SLICE, 0, 0, 0, 0}};          // :
inline constexpr IndexItem ellipsis{tensord_index_item{TENSORD_ELLIPSIS, 0, 0, 0, 0}};  // ...
inline constexpr IndexItem new_axis{tensord_index_item{TENSORD_NEW_AXIS, 0, 0, 0, 0}};  // None

// start:stop:step; std::nullopt leaves one out. Negative numbers count from the end.
inline constexpr IndexItem slice(std::optional<int64_t> start, std::optional<int64_t> stop,
                                 std::optional<int64_t> step = std::nullopt) {
  const uint32_t given =
      (start ? TENSORD_HAS_START : 0) | (stop ? TENSORD_HAS_STOP : 0) | (step ? TENSORD_HAS_STEP : 0);
  return IndexItem(tensord_index_item{TENSORD_SLICE, given, start.value_or(0), stop.value_or(0), step.value_or(0)});
}

// Which part of a tensor: {all, slice(0, 8704)}, or parsed out of "[:, 0:8704]". Empty: the whole tensor.
class Index {
 public:
  Index() = default;
  Index(std::initializer_list<IndexItem> items) {
    for (const IndexItem& one : items) items_.push_back(one.item);
  }

  // With or without the brackets. TENSORD_INVALID_ARGUMENT shows where it stops making sense.
  static Result<Index> parse(const std::string& text);

  const tensord_index_item* data() const { return items_.data(); }
  size_t size() const { return items_.size(); }

 private:
  std::vector<tensord_index_item> items_;
};

// ---- tensors and copies ------------------------------------------------------------------------------------

// A tensor of a model, where it lies. Borrowed: name, dtype and shape go with the Model, the bytes with the last
// Mapping of it.
class Tensor {
 public:
  explicit Tensor(const tensord_tensor& raw) : raw_(raw) {}
  std::string_view name() const { return raw_.name; }
  std::string_view dtype_text() const { return raw_.dtype_text; }  // as the file wrote it
  tensord_dtype dtype() const { return static_cast<tensord_dtype>(raw_.dtype); }
  std::span<const uint64_t> shape() const { return {raw_.shape, raw_.rank}; }  // elements
  uint64_t size_bytes() const { return raw_.size_bytes; }
  // Row-major. Wait before reading: until then the bytes are any. Empty when the model was opened for its index only.
  std::span<const std::byte> bytes() const {
    return {static_cast<const std::byte*>(raw_.data), raw_.data == nullptr ? 0 : raw_.size_bytes};
  }
  const tensord_tensor& raw() const { return raw_; }

 private:
  tensord_tensor raw_;
};

// Memory of the caller, of the CPU or of a GPU. `shape` in elements; `strides` in bytes, may be negative; empty: row-major.
struct Target {
  void* data = nullptr;  // element (0, 0, ..)
  tensord_dtype dtype = TENSORD_OPAQUE;
  std::vector<uint64_t> shape;
  std::vector<int64_t> strides = {};
};

struct Copy {
  std::string name;
  Index index = {};
  Target target;
};

enum class Cast : uint8_t { refuse, convert };
struct CopyOptions {
  Cast cast = Cast::refuse;         // where dtypes differ
  int thread_count = 0;             // 0: one per core
  const int32_t* cancel = nullptr;  // see tensord_copy_options
};

// ---- models ------------------------------------------------------------------------------------------------

// Keeps the bytes of a model's tensors mapped, and the daemon's lease on them, when the Model itself is gone.
class Mapping {
 public:
  explicit Mapping(tensord_mapping* mapping) : mapping_(mapping) {}

 private:
  struct Release {
    void operator()(tensord_mapping* mapping) const { tensord_release_mapping(mapping); }
  };
  std::unique_ptr<tensord_mapping, Release> mapping_;
};

enum class Autostart : int32_t { from_environment = -1, no = 0, yes = 1 };
enum class Read : uint8_t { everything, index_only };
enum class Resident : int32_t { artifact = TENSORD_RESIDENT_ARTIFACT, view = TENSORD_RESIDENT_VIEW };
struct OpenOptions {
  Autostart autostart = Autostart::from_environment;  // whether to start a daemon when none runs
  Read read = Read::everything;
  Resident resident = Resident::artifact;
  std::vector<std::string> only = {};  // names and patterns of the tensors that are wanted; empty: all
  int64_t memory_wait_ms = 0;          // for memory that others hold; 0: as the daemon's setting says, -1: none
};

inline constexpr int64_t kNoTimeout = -1;

class Model {
 public:
  // One path to a file or a folder, or several to files. Returns while the daemon's replica still fills.
  static Result<Model> open(const std::vector<std::string>& paths, const OpenOptions& options = {});

  // Resident::view also where the artifact is larger than the daemon's host_memory.
  Resident resident() const { return static_cast<Resident>(tensord_resident(model_.get())); }
  // With Resident::view: some tensors alone, mapped.
  Result<Model> open_part(const std::vector<std::string>& names) const;

  size_t tensor_count() const { return tensord_tensor_count(model_.get()); }
  std::vector<Tensor> tensors() const;                                // in the order of names
  std::vector<std::string> files() const;                             // the paths of the files the tensors lie in
  std::vector<std::pair<std::string, std::string>> metadata() const;  // the files' free-form __metadata__
  Result<Tensor> find(const std::string& name) const;

  // Until all bytes are there and checked, or those of one tensor. A failed load's error is returned.
  Status wait(int64_t timeout_ms = kNoTimeout) const {
    return status_of(tensord_wait(model_.get(), nullptr, timeout_ms));
  }
  Status wait(const std::string& name, int64_t timeout_ms = kNoTimeout) const {
    return status_of(tensord_wait(model_.get(), name.c_str(), timeout_ms));
  }
  tensord_progress progress() const;  // never blocks
  Result<std::string> info() const;   // a JSON object, see tensord_info

  // Keeps bytes mapped beyond this Model.
  Mapping mapping() const { return Mapping(tensord_retain_mapping(model_.get())); }

  // The region that `index` picks out of a tensor: offsets and strides from the tensor's first byte.
  Result<tensord_region> resolve(const std::string& name, const Index& index) const;

  // Copies (slices of) tensors into the caller's memory as one plan, checked whole before the first byte is written.
  // Waits for the bytes it needs. Its threads end before it returns.
  Result<tensord_copy_report> load_into(const std::vector<Copy>& copies, const CopyOptions& options = {}) const;

 private:
  struct Close {
    void operator()(tensord_model* model) const { tensord_close(model); }
  };
  explicit Model(tensord_model* model) : model_(model) {}
  std::unique_ptr<tensord_model, Close> model_;
};

// Asks the daemon: "status", "list", "explain", ... (tensord_call in tensord.h). Returns JSON.
Result<std::string> call(const std::string& verb, const std::string& selector = "",
                         Autostart autostart = Autostart::no);

// ---- definitions -------------------------------------------------------------------------------------------

inline Result<Index> Index::parse(const std::string& text) {
  Index index;
  index.items_.resize(TENSORD_INDEX_ITEMS_MAX);
  size_t name_bytes = 0, count = 0;
  const std::string view = text.starts_with('[') ? text : "[" + text + "]";
  const int code = tensord_parse_view(view.c_str(), &name_bytes, index.items_.data(), &count);
  if (name_bytes > 0) return Error{TENSORD_INVALID_ARGUMENT, "index '" + text + "': its brackets do not match"};
  index.items_.resize(count);
  return result_of(code, std::move(index));
}

inline std::vector<const char*> pointers_to(const std::vector<std::string>& texts) {
  std::vector<const char*> pointers;
  for (const std::string& text : texts) pointers.push_back(text.c_str());
  return pointers;
}

inline Result<Model> Model::open(const std::vector<std::string>& paths, const OpenOptions& options) {
  const std::vector<const char*> names = pointers_to(paths);
  const std::vector<const char*> only = pointers_to(options.only);
  const tensord_open_options wishes = {sizeof wishes,
                                       static_cast<int32_t>(options.autostart),
                                       options.read == Read::index_only,
                                       static_cast<int32_t>(options.resident),
                                       only.data(),
                                       only.size(),
                                       options.memory_wait_ms};
  tensord_model* model = nullptr;
  const int code = tensord_open(names.data(), names.size(), &wishes, &model);
  return result_of(code, Model(model));
}

inline Result<Model> Model::open_part(const std::vector<std::string>& names) const {
  const std::vector<const char*> wanted = pointers_to(names);
  tensord_model* part = nullptr;
  const int code = tensord_open_part(model_.get(), wanted.data(), wanted.size(), &part);
  return result_of(code, Model(part));
}

inline std::vector<Tensor> Model::tensors() const {
  std::vector<Tensor> tensors;
  tensord_tensor raw;
  for (size_t at = 0; tensord_tensor_at(model_.get(), at, &raw) == TENSORD_OK; ++at) tensors.emplace_back(raw);
  return tensors;
}

inline Result<Tensor> Model::find(const std::string& name) const {
  tensord_tensor raw;
  const int code = tensord_find_tensor(model_.get(), name.c_str(), &raw);
  if (code != TENSORD_OK) return last_error(code);
  return Tensor(raw);
}

inline std::vector<std::string> Model::files() const {
  std::vector<std::string> paths;
  for (size_t at = 0; at < tensord_file_count(model_.get()); ++at)
    paths.emplace_back(tensord_file_path(model_.get(), at));
  return paths;
}

inline std::vector<std::pair<std::string, std::string>> Model::metadata() const {
  std::vector<std::pair<std::string, std::string>> pairs;
  const char *key = nullptr, *value = nullptr;
  for (size_t at = 0; tensord_metadata_at(model_.get(), at, &key, &value) == TENSORD_OK; ++at)
    pairs.emplace_back(key, value);
  return pairs;
}

inline tensord_progress Model::progress() const {
  tensord_progress progress = {};
  tensord_get_progress(model_.get(), &progress);
  return progress;
}

// The text of a call that gives one through char**.
inline Result<std::string> take_text(int code, char* text) {
  if (code != TENSORD_OK) return last_error(code);
  std::string taken(text);
  tensord_free(text);
  return taken;
}

inline Result<std::string> Model::info() const {
  char* json = nullptr;
  const int code = tensord_info(model_.get(), &json);
  return take_text(code, json);
}

inline Result<tensord_region> Model::resolve(const std::string& name, const Index& index) const {
  tensord_region region = {};
  const int code = tensord_resolve(model_.get(), name.c_str(), index.data(), index.size(), &region);
  return result_of(code, region);
}

inline Result<tensord_copy_report> Model::load_into(const std::vector<Copy>& copies, const CopyOptions& options) const {
  std::vector<tensord_copy> raw;
  raw.reserve(copies.size());
  for (const Copy& copy : copies) {
    const Target& target = copy.target;
    if (!target.strides.empty() && target.strides.size() != target.shape.size()) {
      return Error{TENSORD_INVALID_ARGUMENT, copy.name + ": a target with " + std::to_string(target.shape.size()) +
                                                 " dimensions and " + std::to_string(target.strides.size()) +
                                                 " strides"};
    }
    raw.push_back({copy.name.c_str(), copy.index.data(), copy.index.size(), target.data,
                   static_cast<uint32_t>(target.dtype), static_cast<uint32_t>(target.shape.size()), target.shape.data(),
                   target.strides.empty() ? nullptr : target.strides.data()});
  }
  const tensord_copy_options wishes = {sizeof wishes, options.cast == Cast::convert, options.thread_count, 0,
                                       options.cancel};
  tensord_copy_report report = {};
  const int code = tensord_load_into(model_.get(), raw.data(), raw.size(), &wishes, &report);
  return result_of(code, report);
}

inline Result<std::string> call(const std::string& verb, const std::string& selector, Autostart autostart) {
  char* json = nullptr;
  const int code =
      tensord_call(verb.c_str(), selector.empty() ? nullptr : selector.c_str(), static_cast<int32_t>(autostart), &json);
  return take_text(code, json);
}

}  // namespace tensord
