/* tensord: the C ABI of libtensord.so.
 *
 * A function returns TENSORD_OK or one of the codes below; tensord_error_message() then tells what was tried, on what,
 * why it failed and what to do. Handles may be used from several threads at once. No function throws, none aborts on
 * bad input, none leaves a thread behind. After fork() the child may go on using its handles: mappings and leases are
 * inherited, the connection is made anew.
 *
 * Strings are UTF-8 and end with NUL. Sizes are bytes, shapes are elements, strides are bytes. A pointer that must not
 * be NULL and is gives TENSORD_INVALID_ARGUMENT. A struct with struct_bytes may be larger than this library knows it (of
 * a newer header): the fields behind are ignored. One of an older header may be smaller: the fields it lacks are 0. What is
 * smaller than the first header knew it is refused.
 */
#ifndef TENSORD_TENSORD_H_
#define TENSORD_TENSORD_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define TENSORD_EXPORT __attribute__((visibility("default")))

/* Changes whenever a struct or function below changes in a way that old callers would not survive. */
#define TENSORD_ABI_VERSION 4
#define TENSORD_RANK_MAX 64

typedef enum tensord_code {
  TENSORD_OK = 0,
  TENSORD_NOT_FOUND = 1,
  TENSORD_INVALID_ARGUMENT = 2,
  TENSORD_EXHAUSTED = 3,
  TENSORD_UNAVAILABLE = 4,
  TENSORD_CANCELLED = 5,
  TENSORD_CORRUPT = 6,
  TENSORD_CHANGED = 7,
  TENSORD_DENIED = 8,
  TENSORD_UNSUPPORTED = 9,
  TENSORD_INTERNAL = 10
} tensord_code;

typedef enum tensord_dtype {
  TENSORD_OPAQUE = 0,
  TENSORD_BOOL = 1,
  TENSORD_F4 = 2,
  TENSORD_F6_E2M3 = 3,
  TENSORD_F6_E3M2 = 4,
  TENSORD_U8 = 5,
  TENSORD_I8 = 6,
  TENSORD_F8_E5M2 = 7,
  TENSORD_F8_E4M3 = 8,
  TENSORD_F8_E8M0 = 9,
  TENSORD_F8_E4M3FNUZ = 10,
  TENSORD_F8_E5M2FNUZ = 11,
  TENSORD_I16 = 12,
  TENSORD_U16 = 13,
  TENSORD_F16 = 14,
  TENSORD_BF16 = 15,
  TENSORD_I32 = 16,
  TENSORD_U32 = 17,
  TENSORD_F32 = 18,
  TENSORD_C64 = 19,
  TENSORD_F64 = 20,
  TENSORD_I64 = 21,
  TENSORD_U64 = 22
} tensord_dtype;

/* ---- this library ------------------------------------------------------------------------------------------------ */

TENSORD_EXPORT uint32_t tensord_abi_version(void);
TENSORD_EXPORT const char* tensord_version(void); /* "0.1.0"; static */

/* Of the last call that failed on this thread; valid until the next call on it. */
TENSORD_EXPORT const char* tensord_error_message(void);
/* 1 when that call may have written into the caller's memory before it failed, 0 when the memory is untouched. */
TENSORD_EXPORT int tensord_error_target_dirty(void);

/* Gives back a string that a function below returned through char**. NULL is allowed. */
TENSORD_EXPORT void tensord_free(char* text);

/* ---- models ------------------------------------------------------------------------------------------------------ */

typedef struct tensord_model tensord_model;
typedef struct tensord_mapping tensord_mapping;

typedef enum tensord_state { TENSORD_FILLING = 0, TENSORD_READY = 1, TENSORD_FAILED = 2 } tensord_state;

/* What of an artifact the daemon keeps in memory. ARTIFACT: all of it. VIEW: what a call is about to copy, in batches, so
 * that the artifact may be larger than the daemon's host_memory. */
typedef enum tensord_resident { TENSORD_RESIDENT_ARTIFACT = 0, TENSORD_RESIDENT_VIEW = 1 } tensord_resident_t;

typedef struct tensord_open_options {
  uint32_t struct_bytes; /* sizeof(tensord_open_options); fields are only ever appended */
  int32_t autostart;     /* 1: start a daemon when none runs, 0: do not, -1: as $TENSORD_AUTOSTART says (default 1) */
  int32_t index_only;    /* 1: read the headers only; nothing is loaded, no bytes can be had */
  int32_t resident;      /* tensord_resident_t */
  /* Names of tensors, and patterns (*, ?, [a-z], [!a-z]) of names; only these tensors are read and seen. A text that is a
   * name means that tensor alone. One that means none is TENSORD_NOT_FOUND. only_count 0: all tensors. */
  const char* const* only;
  size_t only_count;
  int64_t memory_wait_ms; /* for memory that others hold. 0: as the daemon's setting says, -1: not at all */
  const int32_t* cancel;  /* NULL, or a number of the caller's: once another thread sets it to other than 0, waiting for
                             the daemon's answer ends within a tenth of a second with TENSORD_CANCELLED */
  /* NULL: in host memory. A GPU, "cuda:0" as this process numbers them, or its UUID, "GPU-...": the daemon keeps the tensors
   * in its memory, where this process may read and not write them. Such a model has GPU addresses (tensord_tensor.data), each
   * a multiple of 256, and tensord_load_into writes to GPU memory alone. */
  const char* device;
  int32_t hold_only; /* 1, on a GPU: nothing is mapped here, and tensord_tensor.data is NULL */
  int32_t reserved;
} tensord_open_options;

/* Opens a checkpoint: one path to a file, one path to a folder with model.safetensors.index.json (or one .safetensors
 * file in it), or several paths to files. Returns while the daemon's replica still fills. `options` may be NULL. */
TENSORD_EXPORT int tensord_open(const char* const* paths, size_t path_count, const tensord_open_options* options,
                                tensord_model** model);
/* Other than asked for where the artifact is larger than the daemon's host_memory: then it is TENSORD_RESIDENT_VIEW. Such a
 * model has no mapping (tensord_tensor.data is NULL, tensord_wait returns at once); tensord_load_into works as ever, but for
 * single tensors larger than host_memory (TENSORD_EXHAUSTED, nothing written). */
TENSORD_EXPORT tensord_resident_t tensord_resident(const tensord_model* model);
/* Of such a model, a model of some tensors alone, with a mapping; the daemon forgets it with its last reference. Names are
 * as in tensord_open_options.only. */
TENSORD_EXPORT int tensord_open_part(const tensord_model* model, const char* const* names, size_t name_count,
                                     tensord_model** part);
/* Frees the handle. Mappings that were retained stay valid. NULL is allowed. */
TENSORD_EXPORT void tensord_close(tensord_model* model);

/* The memory that holds the tensors, private copy-on-write: a write into it changes this process's copy only. (Where
 * the kernel's strict overcommit refuses so much private memory it is read-only, a write is a SIGSEGV, and tensord_info
 * says "copy_on_write": false.) Retains it; it is unmapped, and the daemon's lease ends, when the model is closed and
 * every retained reference (in every process, after fork) is released. NULL with index_only, with
 * TENSORD_RESIDENT_VIEW, and when it fails. */
TENSORD_EXPORT tensord_mapping* tensord_retain_mapping(tensord_model* model);
TENSORD_EXPORT void tensord_release_mapping(tensord_mapping* mapping);

typedef struct tensord_tensor {
  const char* name; /* valid until tensord_close */
  const char* dtype_text;
  const uint64_t* shape; /* rank elements */
  uint32_t rank;
  uint32_t dtype; /* tensord_dtype */
  uint32_t file;
  uint32_t reserved;
  uint64_t file_offset; /* of the first byte in its file */
  uint64_t size_bytes;
  const void* data; /* in the mapping; wait before reading. NULL without a mapping */
} tensord_tensor;

TENSORD_EXPORT size_t tensord_tensor_count(const tensord_model* model);
/* By position, in the order of names. */
TENSORD_EXPORT int tensord_tensor_at(const tensord_model* model, size_t position, tensord_tensor* tensor);
TENSORD_EXPORT int tensord_find_tensor(const tensord_model* model, const char* name, tensord_tensor* tensor);

TENSORD_EXPORT size_t tensord_file_count(const tensord_model* model);
TENSORD_EXPORT const char* tensord_file_path(const tensord_model* model, size_t position);
TENSORD_EXPORT size_t tensord_metadata_count(const tensord_model* model);
TENSORD_EXPORT int tensord_metadata_at(const tensord_model* model, size_t position, const char** key,
                                       const char** value);

/* Waits until the bytes of tensor `name` (NULL: of all) are there and checked. timeout_ms -1: no limit; when it passes,
 * TENSORD_UNAVAILABLE. The error of a failed load is returned with its own code. */
TENSORD_EXPORT int tensord_wait(tensord_model* model, const char* name, int64_t timeout_ms);

typedef struct tensord_progress {
  uint32_t state; /* tensord_state */
  uint32_t reserved;
  uint64_t ready_bytes;
  uint64_t total_bytes;
} tensord_progress;
/* Never blocks. */
TENSORD_EXPORT int tensord_get_progress(const tensord_model* model, tensord_progress* progress);

/* What is known of the model as a JSON object: path, files, state, artifact (id, once ready), replica, payload_bytes,
 * image_bytes, tensor_count, ready_bytes, total_bytes, resident ("artifact" or "view"), only (as asked for, or null),
 * copy_on_write (see tensord_retain_mapping; false without a mapping). Where the daemon had a replica of more tensors, it
 * serves: replica and the bytes are then its own, and artifact is null. Free it with tensord_free. */
TENSORD_EXPORT int tensord_info(const tensord_model* model, char** json);

/* ---- slices and copies ------------------------------------------------------------------------------------------- */

typedef enum tensord_index_kind {
  TENSORD_SLICE = 0,
  TENSORD_INTEGER = 1, /* `start` is the number; removes its dimension */
  TENSORD_ELLIPSIS = 2,
  TENSORD_NEW_AXIS = 3
} tensord_index_kind;

#define TENSORD_HAS_START 1u
#define TENSORD_HAS_STOP 2u
#define TENSORD_HAS_STEP 4u

typedef struct tensord_index_item {
  uint32_t kind;  /* tensord_index_kind */
  uint32_t given; /* TENSORD_HAS_*: which of a slice's numbers count; the others are numpy's defaults */
  int64_t start, stop, step;
} tensord_index_item;

typedef struct tensord_region {
  uint64_t offset; /* of element (0, 0, ..), from the tensor's first byte */
  uint32_t rank;
  uint32_t element_bytes;
  uint64_t shape[TENSORD_RANK_MAX];
  int64_t strides[TENSORD_RANK_MAX];
} tensord_region;

#define TENSORD_INDEX_ITEMS_MAX 128

/* Reads a tensor's name with an index behind it, "w[:, 0:8704]", or one of the two alone: `name_bytes` receives how long
 * the name is, `count` how many items there are. `items` has room for TENSORD_INDEX_ITEMS_MAX. */
TENSORD_EXPORT int tensord_parse_view(const char* text, size_t* name_bytes, tensord_index_item* items, size_t* count);

/* The region that numpy's basic indexing picks out of a tensor. item_count 0: the whole tensor. */
TENSORD_EXPORT int tensord_resolve(const tensord_model* model, const char* name, const tensord_index_item* items,
                                   size_t item_count, tensord_region* region);

/* One copy of a (slice of a) tensor into the caller's memory: of the CPU, or of a GPU (an address that CUDA's driver knows
 * in this process). What was begun on that GPU's streams with the target must be over.
 * In place of items (then item_count is 0) the source may be any region of the tensor's bytes: source_strides is not NULL.
 * Its shape is the target's, its elements need not be the tensor's own. One that leaves the tensor is
 * TENSORD_INVALID_ARGUMENT. */
typedef struct tensord_copy {
  const char* name;
  const tensord_index_item* items;
  size_t item_count;
  void* target; /* element (0, 0, ..) */
  uint32_t target_dtype;
  uint32_t target_rank;
  const uint64_t* target_shape;
  const int64_t* target_strides; /* may be negative; NULL: row-major */
  uint32_t
      on_device; /* 1: the target is GPU memory for sure, though no driver in this process may know it; 0: found out */
  uint32_t source_dtype;         /* tensord_dtype of the region's elements, which are whole bytes */
  uint64_t source_offset;        /* of the region's element (0, 0, ..), from the tensor's first byte */
  const int64_t* source_strides; /* target_rank of them; may be negative, 0 repeats; NULL: items tell the source */
} tensord_copy;

/* Why a copy into GPU memory was left out: a cast, or elements that are not side by side in both places; or memory that the
 * daemon cannot write to. */
typedef enum tensord_left_out { TENSORD_LEFT_OUT_BY_SHAPE = 1, TENSORD_LEFT_OUT_BY_MEMORY = 2 } tensord_left_out;

typedef struct tensord_copy_options {
  uint32_t struct_bytes; /* sizeof(tensord_copy_options); fields are only ever appended */
  int32_t cast;          /* 1: F16, BF16, F32, F64 (and F8 as a source) are converted where dtypes differ; 0: refused */
  int32_t thread_count;  /* 0: one per core */
  int32_t reserved;
  const int32_t* cancel; /* NULL, or a number of the caller's: once another thread sets it to other than 0, the call
                            ends within a tenth of a second with TENSORD_CANCELLED */
  /* NULL, or copy_count zeros: for each copy into GPU memory that was not done, a tensord_left_out is written. It is to be
   * copied in another way; tensord_copy_report.left_out says why. NULL: such copies are TENSORD_UNSUPPORTED. */
  uint8_t* left_out;
} tensord_copy_options;

typedef struct tensord_copy_report {
  uint64_t bytes; /* written */
  uint64_t record_count;
  uint32_t thread_count;
  uint32_t reserved;
  int64_t plan_ns, wait_ns, copy_ns;
  uint64_t device_bytes;     /* of `bytes`: written by the daemon's copy engines to GPU memory */
  int64_t device_prepare_ns; /* of copy_ns: opening that memory in the daemon, registering the daemon's own */
  char left_out[256];        /* why copies were left out; empty when none was */
} tensord_copy_report;

/* Runs all copies as one plan. The plan is checked whole before the first byte is written: shapes, dtypes, bounds, and
 * that no two targets overlap. Waits for the bytes it needs. Threads end before it returns. `options` and `report` may
 * be NULL. */
TENSORD_EXPORT int tensord_load_into(tensord_model* model, const tensord_copy* copies, size_t copy_count,
                                     const tensord_copy_options* options, tensord_copy_report* report);

/* ---- the daemon -------------------------------------------------------------------------------------------------- */

/* Verbs: "status", "list", "evict", "pin", "unpin", "verify", "explain", "stop". `selector`: a replica's number, as
 * tensord_info and "list" tell it, or NULL where the verb needs none.
 * `json` receives the reply (docs/PROTOCOL.md describes each); free it with tensord_free. autostart as in
 * tensord_open_options; verbs other than "status" usually want 0. */
TENSORD_EXPORT int tensord_call(const char* verb, const char* selector, int autostart, char** json);

#ifdef __cplusplus
}
#endif

#endif /* TENSORD_TENSORD_H_ */
