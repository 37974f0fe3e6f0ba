/* SparseLinearInt8, a part of fused_int8.c: inputs, outputs and attributes of FusedLinearInt8, and two attributes more.

   The kernels take panels: the bytes of 64 rows side by side, feature after feature. Where x_panels (or codes_panels)
   is set, x (or the codes) are such panels, one behind the other, and the rows that do not fill one lie behind them in
   rows as ever: a tensor keeps its shape and its size. So codes go from one sparse linear to the next without being
   turned. */

enum { BLOCK = 4, ALIGNED = 64 };

typedef struct {
  Api api;
  const SparseForm *form;
  TurnFunction *to_panel, *to_rows;
  i32 *stream, *firsts, *starts;
  i32 x_panels, codes_panels;
  float zero;
} SparseKernel;

/* Whether bytes leave the kernel in rows: with floats, or with a residual. */
static i32 in_rows(const Sizes *form) { return form->floats || form->epilogue >= RESIDUAL_SUM; }

/* The groups of a row of blocks, written to `stream` where that is not NULL (see pack_sparse in sparse_int8.py). */
static i32 pack_blocks(const SparseForm *form, const signed char *weight, i32 row, i32 *stream) {
  i32 inner = form->sizes.inner, group = form->group, words = group + BLOCK, found = 0;
  i32 count = form->sizes.outputs - row * BLOCK < BLOCK ? form->sizes.outputs - row * BLOCK : BLOCK;
  const signed char *from = weight + (i64)row * BLOCK * inner;
  for (i32 k = 0; k < inner; k++) {
    i32 kept = 0;
    for (i32 o = 0; o < count; o++) kept |= from[(i64)o * inner + k];
    if (!kept) continue;
    i32 at = found++ % group;
    if (!stream) continue;
    i32 *record = stream + (i64)((found - 1) / group) * words;
    for (i32 i = 0; !at && i < words; i++) record[i] = 0;
    record[at] = k * CHUNK;
    for (i32 o = 0; o < count; o++) {
      if (group == 4)
        ((signed char *)(record + group + o))[at] = from[(i64)o * inner + k];
      else
        ((short *)(record + group + o))[at] = from[(i64)o * inner + k];
    }
  }
  return (found + group - 1) / group;
}

static void destroy_sparse(void *given) {
  SparseKernel *kernel = given;
  if (!kernel) return;
  free(kernel->stream);
  free(kernel->firsts);
  free(kernel->starts);
  free(kernel);
}

static Status *create_sparse(const CustomOp *op, Api api, const void *info, void **made) {
  (void)op;
  Sizes wanted;
  i64 zeros[2], x_panels, codes_panels;
  const signed char *weight;
  CHECK(asked(api, info, &wanted, zeros, &weight));
  CHECK(KernelInfoGetAttribute_int64(info, "x_panels", &x_panels));
  CHECK(KernelInfoGetAttribute_int64(info, "codes_panels", &codes_panels));
  const SparseForm *form = find(SPARSE_KERNELS, SPARSE_COUNT, sizeof *form, &wanted);
  if (!form) return no_kernel(api);
  i32 rows = (wanted.outputs + BLOCK - 1) / BLOCK;
  SparseKernel *kernel = malloc(sizeof *kernel);
  if (!kernel) return CreateStatus(ORT_FAIL, "SparseLinearInt8: out of memory");
  *kernel = (SparseKernel){.api = api, .form = form, .zero = (float)zeros[1]};
  kernel->x_panels = x_panels != 0, kernel->codes_panels = codes_panels != 0;
  for (i32 i = 0; i < TURN_COUNT; i++)
    if (TURN_KERNELS[i].level == form->sizes.level)
      *(TURN_KERNELS[i].into_panel ? &kernel->to_panel : &kernel->to_rows) = TURN_KERNELS[i].run;
  kernel->firsts = malloc((usize)(rows + 1) * sizeof(i32));
  kernel->starts = malloc((usize)(rows * BLOCK) * sizeof(i32));
  i64 count = 0;
  for (i32 row = 0; kernel->firsts && row <= rows; row++) {
    kernel->firsts[row] = (i32)count;
    if (row < rows) count += pack_blocks(form, weight, row, 0);
  }
  kernel->stream = malloc((usize)(count * (form->group + BLOCK) + 1) * sizeof(i32));
  if (!kernel->stream || !kernel->firsts || !kernel->starts) {
    destroy_sparse(kernel);
    return CreateStatus(ORT_FAIL, "SparseLinearInt8: out of memory");
  }
  for (i32 row = 0; row < rows; row++)
    pack_blocks(form, weight, row, kernel->stream + (i64)kernel->firsts[row] * (form->group + BLOCK));
  for (i32 n = 0; n < rows * BLOCK; n++) {
    i64 sum = 0;
    for (i32 k = 0; n < wanted.outputs && k < wanted.inner; k++) sum += weight[(i64)n * wanted.inner + k];
    kernel->starts[n] = (i32)(-zeros[0] * sum);
  }
  *made = kernel;
  return 0;
}

typedef struct {
  Work linear;
  i32 failed;
} SparseWork;

static void sparse_part(void *given, usize index) {
  SparseWork *work = given;
  const SparseKernel *kernel = work->linear.kernel;
  const Sizes *form = &kernel->form->sizes;
  void **in = work->linear.in, **out = work->linear.out;
  i64 first = (i64)index * CHUNK, at = first * form->outputs;
  i32 rows = (i32)(work->linear.rows - first < CHUNK ? work->linear.rows - first : CHUNK), full = rows == CHUNK;
  u8 *x = (u8 *)in[X] + first * form->inner, *codes = form->codes ? (u8 *)out[CODES] + at : 0, *made = codes;
  i32 turns_x = !(full && kernel->x_panels);
  i32 turns_codes = codes && in_rows(form) == (full && kernel->codes_panels);
  char *space = 0;
  if (turns_x || turns_codes) {
    usize size = (usize)(turns_x ? form->inner : 0) + (usize)(turns_codes ? form->outputs : 0);
    space = malloc(size * CHUNK + ALIGNED);
    if (!space) {
      work->failed = 1;
      return;
    }
  }
  u8 *free_bytes = (u8 *)(((usize)space + ALIGNED - 1) / ALIGNED * ALIGNED);
  if (turns_x) {
    i32 sizes[2] = {rows, form->inner};
    kernel->to_panel(sizes, x, free_bytes);
    x = free_bytes;
    free_bytes += (i64)form->inner * CHUNK;
  }
  if (turns_codes) made = free_bytes;
  const float *residual = in[RESIDUAL];
  float *y = out[Y];
  kernel->form->run(&rows, x, kernel->stream, kernel->firsts, kernel->starts, in[SCALES], in[BIAS],
                    residual ? residual + at : 0, in[GAMMA], in[BETA], y ? y + at : 0, made, in[INVERSE],
                    &kernel->zero);
  if (turns_codes) {
    i32 sizes[2] = {rows, form->outputs};
    if (in_rows(form))
      kernel->to_panel(sizes, made, codes);
    else
      kernel->to_rows(sizes, codes, made);
  }
  free(space);
}

static Status *compute_sparse(void *given, void *context) {
  const SparseKernel *kernel = given;
  Api api = kernel->api;
  SparseWork work = {.linear = {.kernel = kernel}};
  CHECK(run_linear(&work.linear, &kernel->form->sizes, api, context, sparse_part));
  return work.failed ? CreateStatus(ORT_FAIL, "SparseLinearInt8: out of memory") : 0;
}
