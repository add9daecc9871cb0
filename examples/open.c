/* open_c CHECKPOINT: opens it, lists its tensors, loads the right half of a matrix into memory of its own, and compares
 * that with the zero-copy tensor. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tensord/tensord.h"

static int complain(int code) {
  fprintf(stderr, "open_c: %s\n", tensord_error_message());
  return code;
}

static void print_tensor(const tensord_tensor* tensor) {
  printf("%s %s [", tensor->name, tensor->dtype_text);
  for (uint32_t at = 0; at < tensor->rank; ++at) printf("%s%" PRIu64, at == 0 ? "" : ", ", tensor->shape[at]);
  printf("]\n");
}

/* Elements of whole bytes, and a column to leave out. */
static int is_matrix(const tensord_tensor* tensor) {
  return tensor->dtype >= TENSORD_U8 && tensor->rank == 2 && tensor->shape[0] > 0 && tensor->shape[1] > 1;
}

static int compare_half(const tensord_tensor* matrix, const char* mine, uint64_t row_bytes) {
  const uint64_t pitch = matrix->size_bytes / matrix->shape[0];
  for (uint64_t row = 0; row < matrix->shape[0]; ++row) {
    const char* theirs = (const char*)matrix->data + row * pitch + (pitch - row_bytes);
    if (memcmp(mine + row * row_bytes, theirs, row_bytes) != 0) {
      fprintf(stderr, "open_c: row %" PRIu64 " differs\n", row);
      return 1;
    }
  }
  return 0;
}

static int load_half(tensord_model* model, const tensord_tensor* matrix) {
  const uint64_t half = matrix->shape[1] / 2;
  const uint64_t row_bytes = matrix->size_bytes / matrix->shape[0] / matrix->shape[1] * half;
  const uint64_t shape[] = {matrix->shape[0], half};
  const tensord_index_item items[] = {
      {.kind = TENSORD_SLICE},
      {.kind = TENSORD_SLICE, .given = TENSORD_HAS_START, .start = -(int64_t)half},
  };
  char* mine = malloc(matrix->shape[0] * row_bytes);
  if (mine == NULL) return 1;
  const tensord_copy copy = {
      .name = matrix->name,
      .items = items,
      .item_count = 2,
      .target = mine,
      .target_dtype = matrix->dtype,
      .target_rank = 2,
      .target_shape = shape,
  };
  tensord_copy_report report;
  int status = tensord_load_into(model, &copy, 1, NULL, &report);
  if (status != TENSORD_OK) {
    complain(status);
  } else if ((status = compare_half(matrix, mine, row_bytes)) == 0) {
    printf("%s[:, -%" PRIu64 ":]: %" PRIu64 " bytes in %" PRIu64 " records, as in the mapping\n", matrix->name, half,
           report.bytes, report.record_count);
  }
  free(mine);
  return status;
}

static int show(tensord_model* model) {
  int status = tensord_wait(model, NULL, -1);
  if (status != TENSORD_OK) return complain(status);
  const size_t count = tensord_tensor_count(model);
  tensord_tensor tensor, matrix = {0};
  int found = 0;
  for (size_t at = 0; at < count; ++at) {
    status = tensord_tensor_at(model, at, &tensor);
    if (status != TENSORD_OK) return complain(status);
    print_tensor(&tensor);
    if (!found && is_matrix(&tensor)) {
      matrix = tensor;
      found = 1;
    }
  }
  return found ? load_half(model, &matrix) : 0;
}

int main(int argc, char** argv) {
  if (argc < 2) {
    fprintf(stderr, "usage: open_c FOLDER | FILE...\n");
    return 2;
  }
  tensord_model* model = NULL;
  int status = tensord_open((const char* const*)argv + 1, (size_t)argc - 1, NULL, &model);
  if (status != TENSORD_OK) return complain(status);
  status = show(model);
  tensord_close(model);
  return status;
}
