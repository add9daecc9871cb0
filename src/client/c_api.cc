// The C ABI over Model: translates, keeps the thread's last error, lets nothing escape.
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <new>
#include <tuple>
#include <unordered_map>

#include "base/text.h"
#include "client/model.h"
#include "tensord/tensord.h"

using tensord::base::Code;
using tensord::base::Error;
using tensord::base::fail;
using tensord::base::Status;
using tensord::base::TargetState;
namespace client = tensord::client;
namespace tensor = tensord::tensor;

struct tensord_model {
  std::shared_ptr<client::Model> model;
  std::vector<std::pair<const char*, const char*>> metadata;  // into the model's index
};

// One reference to a mapping that others may hold too.
struct tensord_mapping {
  std::shared_ptr<client::Mapping> mapping;
};

namespace {

struct LastError {
  std::string message;
  bool target_dirty = false;
};
LastError& last_error() {
  thread_local LastError error;
  return error;
}

int keep(const Error& error) {
  last_error() = {error.message, error.target == TargetState::dirty};
  return static_cast<int>(error.code);
}

tl::unexpected<Error> refuse(const auto&... why) { return fail(Code::invalid_argument, why...); }

struct Argument {
  const char* name;
  const void* pointer;
};

// Runs `work` (a callable that returns a Status) unless one of the arguments is NULL; what the standard library throws
// becomes a code.
template <typename Work>
int guarded(std::initializer_list<Argument> arguments, Work&& work) noexcept {
  try {
    for (const Argument& argument : arguments) {
      if (argument.pointer == nullptr) return keep({Code::invalid_argument, std::string(argument.name) + " is NULL"});
    }
    const Status done = work();
    return done ? TENSORD_OK : keep(done.error());
  } catch (const std::bad_alloc&) {
    return keep({Code::exhausted, "out of memory"});
  } catch (const std::exception& problem) {
    return keep({Code::internal, problem.what()});
  }
}

Status give_text(const std::string& text, char** out) {
  *out = static_cast<char*>(std::malloc(text.size() + 1));
  if (*out == nullptr) return fail(Code::exhausted, "out of memory");
  std::memcpy(*out, text.c_str(), text.size() + 1);
  return {};
}

client::Autostart autostart_of(int32_t wish) {
  if (wish < 0) return client::Autostart::from_environment;
  return wish == 0 ? client::Autostart::no : client::Autostart::yes;
}

void describe(const client::Model& model, const tensor::Tensor& tensor, tensord_tensor* out) {
  out->name = tensor.name.c_str();
  out->dtype_text = tensor.dtype_text.c_str();
  out->shape = tensor.shape.data();
  out->rank = static_cast<uint32_t>(tensor.shape.size());
  out->dtype = static_cast<uint32_t>(tensor.dtype);
  out->file = tensor.file;
  out->reserved = 0;
  out->file_offset = tensor.offset;
  out->size_bytes = tensor.size_bytes;
  out->data = model.data(tensor);
}

tensord_index_item from_item(const tensor::IndexItem& item) {
  const uint32_t given =
      (item.start ? TENSORD_HAS_START : 0) | (item.stop ? TENSORD_HAS_STOP : 0) | (item.step ? TENSORD_HAS_STEP : 0);
  const bool number = item.kind == tensor::IndexItem::Kind::integer;
  return {static_cast<uint32_t>(item.kind), given, number ? item.integer : item.start.value_or(0),
          item.stop.value_or(0), item.step.value_or(0)};
}

Status check_copy(const tensord_copy& copy) {
  constexpr auto kDtypeEnd = static_cast<uint32_t>(tensor::kDtypeCount);
  if (copy.name == nullptr) return refuse("a copy without a name");
  if (copy.target_dtype >= kDtypeEnd || copy.target_rank > TENSORD_RANK_MAX)
    return refuse(copy.name, ": a target of unknown dtype or rank");
  if (copy.target_rank > 0 && copy.target_shape == nullptr) return refuse(copy.name, ": target_shape is NULL");
  if (copy.source_strides != nullptr && copy.source_dtype >= kDtypeEnd)
    return refuse(copy.name, ": a region of unknown dtype");
  return {};
}

client::Result<std::vector<std::string>> to_texts(const char* what, const char* const* texts, size_t count) {
  std::vector<std::string> out;
  for (size_t at = 0; at < count; ++at) {
    if (texts == nullptr || texts[at] == nullptr) return refuse(what, " is NULL");
    out.emplace_back(texts[at]);
  }
  return out;
}

void give_model(std::shared_ptr<client::Model> opened, tensord_model** out) {
  auto made = std::make_unique<tensord_model>();
  made->model = std::move(opened);
  for (const auto& [key, value] : made->model->index().metadata) {
    made->metadata.emplace_back(key.c_str(), value.c_str());
  }
  *out = made.release();
}

}  // namespace

extern "C" {

uint32_t tensord_abi_version(void) { return TENSORD_ABI_VERSION; }
const char* tensord_version(void) { return TENSORD_VERSION; }
const char* tensord_error_message(void) { return last_error().message.c_str(); }
int tensord_error_target_dirty(void) { return last_error().target_dirty ? 1 : 0; }
void tensord_free(char* text) { std::free(text); }

int tensord_open(const char* const* paths, size_t path_count, const tensord_open_options* options,
                 tensord_model** model) {
  return guarded({{"paths", paths}, {"model", model}}, [&]() -> Status {
    *model = nullptr;
    TRY_ASSIGN(const std::vector<std::string> named, to_texts("a path", paths, path_count));
    client::OpenOptions wishes;
    if (options != nullptr) {
      constexpr size_t kFirstBytes = offsetof(tensord_open_options, resident);
      if (options->struct_bytes < kFirstBytes) {
        return refuse("tensord_open_options is too small: is struct_bytes set?");
      }
      tensord_open_options known = {};
      std::memcpy(&known, options, std::min<size_t>(options->struct_bytes, sizeof known));
      wishes.autostart = autostart_of(known.autostart);
      wishes.index_only = known.index_only != 0;
      wishes.memory_wait_ms = known.memory_wait_ms;
      wishes.cancel = known.cancel;
      if (known.device != nullptr) wishes.device = known.device;
      wishes.hold_only = known.hold_only != 0;
      wishes.resident = known.resident == TENSORD_RESIDENT_VIEW ? client::Resident::view : client::Resident::artifact;
      TRY_ASSIGN(wishes.only, to_texts("a name", known.only, known.only_count));
    }
    TRY_ASSIGN(std::shared_ptr<client::Model> opened, client::Model::open(named, wishes));
    give_model(std::move(opened), model);
    return {};
  });
}

tensord_resident_t tensord_resident(const tensord_model* model) {
  const bool view = model != nullptr && model->model->resident() == client::Resident::view;
  return view ? TENSORD_RESIDENT_VIEW : TENSORD_RESIDENT_ARTIFACT;
}

int tensord_open_part(const tensord_model* model, const char* const* names, size_t name_count, tensord_model** part) {
  return guarded({{"model", model}, {"names", names}, {"part", part}}, [&]() -> Status {
    *part = nullptr;
    TRY_ASSIGN(std::vector<std::string> wanted, to_texts("a name", names, name_count));
    TRY_ASSIGN(std::shared_ptr<client::Model> opened, model->model->open_part(std::move(wanted)));
    give_model(std::move(opened), part);
    return {};
  });
}

void tensord_close(tensord_model* model) { std::unique_ptr<tensord_model> gone(model); }

tensord_mapping* tensord_retain_mapping(tensord_model* model) {
  if (model == nullptr || model->model->mapping() == nullptr) return nullptr;
  auto made = std::unique_ptr<tensord_mapping>(new (std::nothrow) tensord_mapping{model->model->mapping()});
  if (made == nullptr) keep({Code::exhausted, "out of memory"});
  return made.release();
}
void tensord_release_mapping(tensord_mapping* mapping) { std::unique_ptr<tensord_mapping> gone(mapping); }

size_t tensord_tensor_count(const tensord_model* model) {
  return model == nullptr ? 0 : model->model->index().tensors.size();
}

int tensord_tensor_at(const tensord_model* model, size_t position, tensord_tensor* tensor) {
  return guarded({{"model", model}, {"tensor", tensor}}, [&]() -> Status {
    const auto& tensors = model->model->index().tensors;
    if (position >= tensors.size()) return fail(Code::not_found, "no tensor at this position");
    describe(*model->model, tensors[position], tensor);
    return {};
  });
}

int tensord_find_tensor(const tensord_model* model, const char* name, tensord_tensor* tensor) {
  return guarded({{"model", model}, {"name", name}, {"tensor", tensor}}, [&]() -> Status {
    TRY_ASSIGN(const tensor::Tensor* found, model->model->find(name));
    describe(*model->model, *found, tensor);
    return {};
  });
}

size_t tensord_file_count(const tensord_model* model) {
  return model == nullptr ? 0 : model->model->index().files.size();
}
const char* tensord_file_path(const tensord_model* model, size_t position) {
  if (model == nullptr) return nullptr;
  const auto& files = model->model->index().files;
  return position < files.size() ? files[position].path.c_str() : nullptr;
}
size_t tensord_metadata_count(const tensord_model* model) { return model == nullptr ? 0 : model->metadata.size(); }
int tensord_metadata_at(const tensord_model* model, size_t position, const char** key, const char** value) {
  return guarded({{"model", model}, {"key", key}, {"value", value}}, [&]() -> Status {
    if (position >= model->metadata.size()) return fail(Code::not_found, "no metadata at this position");
    std::tie(*key, *value) = model->metadata[position];
    return {};
  });
}

int tensord_wait(tensord_model* model, const char* name, int64_t timeout_ms) {
  return guarded({{"model", model}}, [&]() -> Status {
    const tensor::Tensor* wanted = nullptr;
    if (name != nullptr) {
      TRY_ASSIGN(wanted, model->model->find(name));
    }
    return model->model->wait(wanted, timeout_ms);
  });
}

int tensord_get_progress(const tensord_model* model, tensord_progress* progress) {
  return guarded({{"model", model}, {"progress", progress}}, [&]() -> Status {
    const client::Model& known = *model->model;
    *progress = {static_cast<uint32_t>(known.state()), 0, known.ready_bytes(), known.total_bytes()};
    return {};
  });
}

int tensord_info(const tensord_model* model, char** json) {
  return guarded({{"model", model}, {"json", json}}, [&] { return give_text(model->model->info_json(), json); });
}

int tensord_parse_view(const char* text, size_t* name_bytes, tensord_index_item* items, size_t* count) {
  return guarded({{"text", text}, {"name_bytes", name_bytes}, {"items", items}, {"count", count}}, [&]() -> Status {
    *name_bytes = *count = 0;
    TRY_ASSIGN(const tensor::ViewItem read, tensor::parse_view_item(text));
    *name_bytes = read.name.size();
    *count = read.items.size();
    std::transform(read.items.begin(), read.items.end(), items, from_item);
    return {};
  });
}

int tensord_resolve(const tensord_model* model, const char* name, const tensord_index_item* items, size_t item_count,
                    tensord_region* region) {
  return guarded({{"model", model}, {"name", name}, {"region", region}}, [&]() -> Status {
    TRY_ASSIGN(const tensor::Tensor* found, model->model->find(name));
    TRY_ASSIGN(const tensor::IndexItems wanted, client::to_items(items, item_count));
    TRY_ASSIGN(const tensor::Strided resolved, tensor::resolve(*found, wanted));
    if (resolved.shape.size() > TENSORD_RANK_MAX) return refuse(name, ": more than 64 dimensions");
    region->offset = resolved.offset;
    region->rank = static_cast<uint32_t>(resolved.shape.size());
    region->element_bytes = resolved.element_bytes;
    std::copy(resolved.shape.begin(), resolved.shape.end(), region->shape);
    std::copy(resolved.strides.begin(), resolved.strides.end(), region->strides);
    return {};
  });
}

int tensord_load_into(tensord_model* model, const tensord_copy* copies, size_t copy_count,
                      const tensord_copy_options* options, tensord_copy_report* report) {
  return guarded({{"model", model}}, [&]() -> Status {
    tensord_copy_options wishes = {};
    if (options != nullptr) {
      if (options->struct_bytes < sizeof wishes) {
        return refuse("tensord_copy_options is too small: is struct_bytes set?");
      }
      if (options->thread_count < 0) return refuse("load_into: thread_count is negative");
      wishes = *options;
    }
    if (copy_count > 0 && copies == nullptr) return refuse("copies is NULL");
    for (size_t at = 0; at < copy_count; ++at) TRY(check_copy(copies[at]));
    TRY_ASSIGN(const client::LoadReport loaded, model->model->load_into({copies, copy_count}, wishes));
    if (report != nullptr) {
      *report = {loaded.copy.target_bytes, loaded.record_count, loaded.copy.thread_count, 0,
                 loaded.plan_ns,           loaded.copy.wait_ns, loaded.copy_ns,           loaded.device.bytes,
                 loaded.device.prepare_ns};
      loaded.left_out_why.copy(report->left_out, sizeof report->left_out - 1);
    }
    return {};
  });
}

int tensord_call(const char* verb, const char* selector, int autostart, char** json) {
  return guarded({{"verb", verb}, {"json", json}}, [&]() -> Status {
    const auto& verbs = tensord::protocol::EnumValuesVerb();
    const auto* known = std::find_if(std::begin(verbs), std::end(verbs), [&](tensord::protocol::Verb one) {
      return std::strcmp(tensord::protocol::EnumNameVerb(one), verb) == 0;
    });
    if (known == std::end(verbs)) return refuse("no verb ", tensord::base::quoted(verb));
    TRY_ASSIGN(const std::string answer,
               client::call(*known, selector == nullptr ? "" : selector, autostart_of(autostart)));
    return give_text(answer, json);
  });
}

}  // extern "C"
