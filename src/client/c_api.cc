// The C ABI over Model: translates, keeps the thread's last error, lets nothing escape.
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <new>
#include <unordered_map>

#include "base/text.h"
#include "client/model.h"
#include "client/version.h"
#include "tensord/tensord.h"

using tensord::base::Code;
using tensord::base::Error;
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
int keep(Code code, std::string message) { return keep(Error{code, std::move(message)}); }

// Runs `work` (a callable that returns int); what the standard library throws becomes a code.
template <typename Work>
int guarded(Work&& work) noexcept {
  try {
    return work();
  } catch (const std::bad_alloc&) {
    return keep(Code::exhausted, "out of memory");
  } catch (const std::exception& problem) {
    return keep(Code::internal, problem.what());
  }
}

int give_text(const std::string& text, char** out) {
  *out = static_cast<char*>(std::malloc(text.size() + 1));
  if (*out == nullptr) return keep(Code::exhausted, "out of memory");
  std::memcpy(*out, text.c_str(), text.size() + 1);
  return TENSORD_OK;
}

// The first argument that must not be NULL and is; its code, or TENSORD_OK.
struct Argument {
  const char* name;
  const void* pointer;
};
int refuse_null(std::initializer_list<Argument> arguments) {
  for (const Argument& argument : arguments) {
    if (argument.pointer == nullptr)
      return keep(Code::invalid_argument, std::string(argument.name) + " is NULL");
  }
  return TENSORD_OK;
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

client::Result<tensor::IndexItems> to_items(const tensord_index_item* items, size_t count) {
  if (count > 0 && items == nullptr) return tensord::base::fail(Code::invalid_argument, "items is NULL");
  if (count > 4 * TENSORD_RANK_MAX)
    return tensord::base::fail(Code::invalid_argument, "too many index items");
  tensor::IndexItems out;
  for (size_t at = 0; at < count; ++at) {
    const tensord_index_item& item = items[at];
    if (item.kind > TENSORD_NEW_AXIS) {
      return tensord::base::fail(Code::invalid_argument,
                                 tensord::base::text("index item of unknown kind ", item.kind));
    }
    tensor::IndexItem one{.kind = static_cast<tensor::IndexItem::Kind>(item.kind)};
    if (item.kind == TENSORD_INTEGER) one.integer = item.start;
    if (item.kind == TENSORD_SLICE) {
      if (item.given & TENSORD_HAS_START) one.start = item.start;
      if (item.given & TENSORD_HAS_STOP) one.stop = item.stop;
      if (item.given & TENSORD_HAS_STEP) one.step = item.step;
    }
    out.push_back(one);
  }
  return out;
}

client::Result<client::CopyOrder> to_order(const tensord_copy& copy) {
  if (copy.name == nullptr) return tensord::base::fail(Code::invalid_argument, "a copy without a name");
  if (copy.target_dtype >= static_cast<uint32_t>(tensor::kDtypeCount) ||
      copy.target_rank > TENSORD_RANK_MAX) {
    return tensord::base::fail(Code::invalid_argument,
                               tensord::base::text(copy.name, ": a target of unknown dtype or rank"));
  }
  if (copy.target_rank > 0 && copy.target_shape == nullptr) {
    return tensord::base::fail(Code::invalid_argument,
                               tensord::base::text(copy.name, ": target_shape is NULL"));
  }
  client::CopyOrder order{.name = copy.name};
  TRY_ASSIGN(order.items, to_items(copy.items, copy.item_count));
  order.target = static_cast<std::byte*>(copy.target);
  order.target_dtype = static_cast<tensor::Dtype>(copy.target_dtype);
  // Sub-byte and opaque targets are bytes, as resolve() makes their sources.
  order.to.element_bytes = tensor::dtype_bytes(order.target_dtype).value_or(1);
  order.to.shape.assign(copy.target_shape, copy.target_shape + copy.target_rank);
  if (copy.target_strides != nullptr) {
    order.to.strides.assign(copy.target_strides, copy.target_strides + copy.target_rank);
    return order;
  }
  order.to.strides.resize(copy.target_rank);
  int64_t stride = order.to.element_bytes;
  for (size_t at = copy.target_rank; at-- > 0;) {
    order.to.strides[at] = stride;
    if (__builtin_mul_overflow(stride, static_cast<int64_t>(order.to.shape[at]), &stride)) {
      return tensord::base::fail(Code::invalid_argument,
                                 tensord::base::text(copy.name, ": a target shape too large"));
    }
  }
  return order;
}

tensord::base::Result<std::vector<std::string>> to_texts(const char* const* texts, size_t count) {
  std::vector<std::string> out;
  for (size_t at = 0; at < count; ++at) {
    if (texts == nullptr || texts[at] == nullptr)
      return tensord::base::fail(Code::invalid_argument, "a name is NULL");
    out.emplace_back(texts[at]);
  }
  return out;
}

int give_model(std::shared_ptr<client::Model> opened, tensord_model** out) {
  auto made = std::make_unique<tensord_model>();
  made->model = std::move(opened);
  for (const auto& [key, value] : made->model->index().metadata) {
    made->metadata.emplace_back(key.c_str(), value.c_str());
  }
  *out = made.release();
  return TENSORD_OK;
}

constexpr std::array<std::pair<const char*, tensord::protocol::Verb>, 8> kVerbs = {{
    {"status", tensord::protocol::Verb::status},
    {"list", tensord::protocol::Verb::list},
    {"evict", tensord::protocol::Verb::evict},
    {"pin", tensord::protocol::Verb::pin},
    {"unpin", tensord::protocol::Verb::unpin},
    {"verify", tensord::protocol::Verb::verify},
    {"explain", tensord::protocol::Verb::explain},
    {"stop", tensord::protocol::Verb::stop},
}};

}  // namespace

extern "C" {

uint32_t tensord_abi_version(void) { return TENSORD_ABI_VERSION; }
const char* tensord_version(void) { return client::kVersion; }
const char* tensord_error_message(void) { return last_error().message.c_str(); }
int tensord_error_target_dirty(void) { return last_error().target_dirty ? 1 : 0; }
void tensord_free(char* text) { std::free(text); }

int tensord_open(const char* const* paths, size_t path_count, const tensord_open_options* options,
                 tensord_model** model) {
  if (const int refused = refuse_null({{"paths", paths}, {"model", model}})) return refused;
  return guarded([&]() -> int {
    *model = nullptr;
    for (size_t at = 0; at < path_count; ++at) {
      if (paths[at] == nullptr) return keep(Code::invalid_argument, "a path is NULL");
    }
    client::OpenOptions wishes;
    if (options != nullptr) {
      constexpr size_t kFirstBytes = offsetof(tensord_open_options, resident);
      if (options->struct_bytes < kFirstBytes) {
        return keep(Code::invalid_argument, "tensord_open_options is too small: is struct_bytes set?");
      }
      tensord_open_options known = {};
      std::memcpy(&known, options, std::min<size_t>(options->struct_bytes, sizeof known));
      wishes.autostart = autostart_of(known.autostart);
      wishes.index_only = known.index_only != 0;
      wishes.resident =
          known.resident == TENSORD_RESIDENT_VIEW ? client::Resident::view : client::Resident::artifact;
      auto only = to_texts(known.only, known.only_count);
      if (!only) return keep(only.error());
      wishes.only = std::move(*only);
    }
    auto opened = client::Model::open(std::vector<std::string>(paths, paths + path_count), wishes);
    if (!opened) return keep(opened.error());
    return give_model(std::move(*opened), model);
  });
}

tensord_resident_t tensord_resident(const tensord_model* model) {
  const bool view = model != nullptr && model->model->resident() == client::Resident::view;
  return view ? TENSORD_RESIDENT_VIEW : TENSORD_RESIDENT_ARTIFACT;
}

int tensord_open_part(const tensord_model* model, const char* const* names, size_t name_count,
                      tensord_model** part) {
  if (const int refused = refuse_null({{"model", model}, {"names", names}, {"part", part}})) return refused;
  return guarded([&]() -> int {
    *part = nullptr;
    auto wanted = to_texts(names, name_count);
    if (!wanted) return keep(wanted.error());
    auto opened = model->model->open_part(std::move(*wanted));
    if (!opened) return keep(opened.error());
    return give_model(std::move(*opened), part);
  });
}

void tensord_close(tensord_model* model) { std::unique_ptr<tensord_model> gone(model); }

tensord_mapping* tensord_retain_mapping(tensord_model* model) {
  if (model == nullptr || model->model->mapping() == nullptr) return nullptr;
  auto made = std::unique_ptr<tensord_mapping>(new (std::nothrow) tensord_mapping{model->model->mapping()});
  if (made == nullptr) keep(Code::exhausted, "out of memory");
  return made.release();
}
void tensord_release_mapping(tensord_mapping* mapping) { std::unique_ptr<tensord_mapping> gone(mapping); }

size_t tensord_tensor_count(const tensord_model* model) {
  return model == nullptr ? 0 : model->model->index().tensors.size();
}

int tensord_tensor_at(const tensord_model* model, size_t position, tensord_tensor* tensor) {
  if (const int refused = refuse_null({{"model", model}, {"tensor", tensor}})) return refused;
  const auto& tensors = model->model->index().tensors;
  if (position >= tensors.size()) return keep(Code::not_found, "no tensor at this position");
  describe(*model->model, tensors[position], tensor);
  return TENSORD_OK;
}

int tensord_find_tensor(const tensord_model* model, const char* name, tensord_tensor* tensor) {
  if (const int refused = refuse_null({{"model", model}, {"name", name}, {"tensor", tensor}})) return refused;
  return guarded([&] {
    const auto found = model->model->find(name);
    if (!found) return keep(found.error());
    describe(*model->model, **found, tensor);
    return static_cast<int>(TENSORD_OK);
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
size_t tensord_metadata_count(const tensord_model* model) {
  return model == nullptr ? 0 : model->metadata.size();
}
int tensord_metadata_at(const tensord_model* model, size_t position, const char** key, const char** value) {
  if (const int refused = refuse_null({{"model", model}, {"key", key}, {"value", value}})) return refused;
  if (position >= model->metadata.size()) return keep(Code::not_found, "no metadata at this position");
  *key = model->metadata[position].first;
  *value = model->metadata[position].second;
  return TENSORD_OK;
}

int tensord_wait(tensord_model* model, const char* name, int64_t timeout_ms) {
  if (const int refused = refuse_null({{"model", model}})) return refused;
  return guarded([&] {
    const tensor::Tensor* wanted = nullptr;
    if (name != nullptr) {
      const auto found = model->model->find(name);
      if (!found) return keep(found.error());
      wanted = *found;
    }
    const auto waited = model->model->wait(wanted, timeout_ms);
    return waited ? static_cast<int>(TENSORD_OK) : keep(waited.error());
  });
}

int tensord_get_progress(const tensord_model* model, tensord_progress* progress) {
  if (const int refused = refuse_null({{"model", model}, {"progress", progress}})) return refused;
  progress->state = static_cast<uint32_t>(model->model->state());
  progress->reserved = 0;
  progress->ready_bytes = model->model->ready_bytes();
  progress->total_bytes = model->model->total_bytes();
  return TENSORD_OK;
}

int tensord_info(const tensord_model* model, char** json) {
  if (const int refused = refuse_null({{"model", model}, {"json", json}})) return refused;
  return guarded([&] { return give_text(model->model->info_json(), json); });
}

int tensord_resolve(const tensord_model* model, const char* name, const tensord_index_item* items,
                    size_t item_count, tensord_region* region) {
  if (const int refused = refuse_null({{"model", model}, {"name", name}, {"region", region}})) return refused;
  return guarded([&] {
    const auto found = model->model->find(name);
    if (!found) return keep(found.error());
    const auto wanted = to_items(items, item_count);
    if (!wanted) return keep(wanted.error());
    const auto resolved = tensor::resolve(**found, *wanted);
    if (!resolved) return keep(resolved.error());
    if (resolved->shape.size() > TENSORD_RANK_MAX) {
      return keep(Code::invalid_argument, tensord::base::text(name, ": more than 64 dimensions"));
    }
    region->offset = resolved->offset;
    region->rank = static_cast<uint32_t>(resolved->shape.size());
    region->element_bytes = resolved->element_bytes;
    std::copy(resolved->shape.begin(), resolved->shape.end(), region->shape);
    std::copy(resolved->strides.begin(), resolved->strides.end(), region->strides);
    return static_cast<int>(TENSORD_OK);
  });
}

int tensord_load_into(tensord_model* model, const tensord_copy* copies, size_t copy_count,
                      const tensord_copy_options* options, tensord_copy_report* report) {
  if (const int refused = refuse_null({{"model", model}})) return refused;
  return guarded([&] {
    client::CopyOrderOptions wishes;
    if (options != nullptr) {
      if (options->struct_bytes < sizeof(tensord_copy_options)) {
        return keep(Code::invalid_argument, "tensord_copy_options is too small: is struct_bytes set?");
      }
      if (options->thread_count < 0)
        return keep(Code::invalid_argument, "load_into: thread_count is negative");
      wishes = {.cast = options->cast != 0, .thread_count = options->thread_count, .cancel = options->cancel};
    }
    if (copy_count > 0 && copies == nullptr) return keep(Code::invalid_argument, "copies is NULL");
    std::vector<client::CopyOrder> orders;
    orders.reserve(copy_count);
    for (size_t at = 0; at < copy_count; ++at) {
      auto order = to_order(copies[at]);
      if (!order) return keep(order.error());
      orders.push_back(std::move(*order));
    }
    const auto loaded = model->model->load_into(orders, wishes);
    if (!loaded) return keep(loaded.error());
    if (report != nullptr) {
      *report = {
          loaded->copy.target_bytes, loaded->record_count, loaded->copy.thread_count, 0, loaded->plan_ns,
          loaded->copy.wait_ns,      loaded->copy_ns};
    }
    return static_cast<int>(TENSORD_OK);
  });
}

int tensord_call(const char* verb, const char* selector, int autostart, char** json) {
  if (const int refused = refuse_null({{"verb", verb}, {"json", json}})) return refused;
  return guarded([&] {
    const auto known = std::find_if(kVerbs.begin(), kVerbs.end(),
                                    [&](const auto& entry) { return std::strcmp(entry.first, verb) == 0; });
    if (known == kVerbs.end()) {
      return keep(Code::invalid_argument, "no verb " + tensord::base::quoted(verb));
    }
    const auto answer =
        client::call(known->second, selector == nullptr ? "" : selector, autostart_of(autostart));
    if (!answer) return keep(answer.error());
    return give_text(*answer, json);
  });
}

}  // extern "C"
