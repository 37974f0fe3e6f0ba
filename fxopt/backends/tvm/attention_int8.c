/* AttentionInt8, a part of fused_int8.c. */

enum { Q, K, V, FACTORS, MASK, ATTENTION_INPUTS };

typedef struct {
  Api api;
  i32 heads, level;
  float zero, factor;
} AttentionKernel;

typedef struct {
  const AttentionKernel *kernel;
  const AttentionForm *form;
  i64 queries, keys, mask_batch, mask_step; /* steps of the mask: 0 where it is shared */
  void *in[ATTENTION_INPUTS];
  u8 *codes;
  i32 failed;
} AttentionWork;

static Status *create_attention(const CustomOp *op, Api api, const void *info, void **made) {
  (void)op;
  i64 zero, heads;
  float factor;
  CHECK(KernelInfoGetAttribute_int64(info, "zero", &zero));
  CHECK(KernelInfoGetAttribute_int64(info, "num_heads", &heads));
  CHECK(KernelInfoGetAttribute_float(info, "factor", &factor));
  if (heads < 1) return CreateStatus(ORT_INVALID_ARGUMENT, "AttentionInt8: num_heads is not positive");
  AttentionKernel *kernel = malloc(sizeof *kernel);
  if (!kernel) return CreateStatus(ORT_FAIL, "AttentionInt8: out of memory");
  *kernel = (AttentionKernel){api, (i32)heads, fxopt_cpu_level(), (float)zero, factor};
  *made = kernel;
  return 0;
}

/* One head of one batch element. The work space is that of `scratch` in attention_int8.py. */
static void head(void *given, usize index) {
  AttentionWork *work = given;
  const AttentionForm *form = work->form;
  i64 batch = (i64)index / work->kernel->heads, column = (i64)index % work->kernel->heads * form->width;
  i64 padded = (work->keys + form->columns - 1) / form->columns * form->columns;
  usize packed = (usize)(2 * padded * form->width) * (form->group == 4 ? 1 : 2);
  usize floats = (usize)(padded * (2 * form->rows + 1) + form->rows), bytes = (usize)(form->rows * (padded + form->width));
  packed = (packed + 63) / 64 * 64, floats = (floats + 15) / 16 * 16;
  char *space = malloc(packed + (floats + (usize)padded) * sizeof(float) + bytes);
  if (!space) {
    work->failed = 1;
    return;
  }
  float *values = (float *)(space + packed), *mask = values + floats;
  if (work->in[MASK])
    mask = (float *)work->in[MASK] + batch * work->mask_batch;
  else
    for (i64 i = 0; i < padded; i++) mask[i] = 0;
  i64 from = batch * work->queries * form->stride + column, key = batch * work->keys * form->stride + column;
  i32 sizes[3] = {(i32)work->queries, (i32)work->keys, (i32)work->mask_step};
  form->run(sizes, (u8 *)work->in[Q] + from, (u8 *)work->in[K] + key, (u8 *)work->in[V] + key, mask,
            &work->kernel->factor, (float *)work->in[FACTORS] + column, &work->kernel->zero, work->codes + from, space,
            values, (u8 *)(values + floats + padded));
  free(space);
}

static Status *compute_attention(void *given, void *context) {
  const AttentionKernel *kernel = given;
  Api api = kernel->api;
  AttentionWork work = {.kernel = kernel};
  i64 sizes[ATTENTION_INPUTS][RANK];
  usize rank[ATTENTION_INPUTS];
  const void *value;
  void *result;
  for (usize i = 0; i < ATTENTION_INPUTS; i++) {
    CHECK(KernelContext_GetInput(context, i, &value));
    if (!value && i == MASK) break;
    CHECK(GetTensorMutableData((void *)value, &work.in[i]));
    CHECK(shape_of(api, value, sizes[i], &rank[i]));
  }
  i32 fit = rank[Q] == 3 && rank[K] == 3 && rank[V] == 3 && rank[FACTORS] == 1;
  for (usize d = 0; fit && d < 3; d++) fit = sizes[K][d] == sizes[V][d] && (d == 1 || sizes[K][d] == sizes[Q][d]);
  if (!fit || sizes[FACTORS][0] != sizes[Q][2])
    return CreateStatus(ORT_INVALID_ARGUMENT, "AttentionInt8: the sizes of q, k, v and inverse do not agree");
  i64 batch = sizes[Q][0], stride = sizes[Q][2];
  work.queries = sizes[Q][1], work.keys = sizes[K][1];
  if (work.in[MASK]) {
    const i64 *size = sizes[MASK];
    fit = rank[MASK] == 4 && (size[0] == 1 || size[0] == batch) && size[1] == 1 && size[3] == work.keys;
    if (!fit || (size[2] != 1 && size[2] != work.queries))
      return CreateStatus(ORT_INVALID_ARGUMENT, "AttentionInt8: the mask is not [1 or batch, 1, 1 or queries, keys]");
    work.mask_step = size[2] == 1 ? 0 : work.keys;
    work.mask_batch = size[0] == 1 ? 0 : size[2] * work.keys;
  }
  for (i32 i = 0; i < ATTENTION_COUNT; i++) {
    const AttentionForm *form = &ATTENTION_KERNELS[i];
    if (form->stride != stride || form->width * (i64)kernel->heads != stride || form->level > kernel->level) continue;
    if (!work.form || work.form->level < form->level) work.form = form;
  }
  if (!work.form) return CreateStatus(ORT_INVALID_ARGUMENT, "AttentionInt8: this library has no kernel for these heads");
  CHECK(KernelContext_GetOutput(context, 0, sizes[Q], 3, &result));
  CHECK(GetTensorMutableData(result, (void **)&work.codes));
  if (!batch || !work.queries) return 0;
  if (!work.keys) return CreateStatus(ORT_INVALID_ARGUMENT, "AttentionInt8: there are no keys");
  CHECK(KernelContext_ParallelFor(context, head, (usize)(batch * kernel->heads), 0, &work));
  return work.failed ? CreateStatus(ORT_FAIL, "AttentionInt8: out of memory") : 0;
}
