/* QuantizeRows and LayerNormQuantizeRows, a part of fused_int8.c. */

enum { ROW_X, ROW_INVERSE, ROW_GAMMA, ROW_BETA, ROW_INPUTS };

typedef struct {
  Api api;
  i32 has_norm, level;
  float zero, eps;
} RowKernel;

typedef struct {
  const RowKernel *kernel;
  const RowForm *form;
  i64 rows;
  const float *in[ROW_INPUTS];
  u8 *codes;
} RowWork;

static Status *create_rows(const void *info, Api api, i32 has_norm, void **made) {
  i64 zero;
  float eps = 0;
  CHECK(KernelInfoGetAttribute_int64(info, "zero", &zero));
  if (has_norm) CHECK(KernelInfoGetAttribute_float(info, "eps", &eps));
  RowKernel *kernel = malloc(sizeof *kernel);
  if (!kernel) return CreateStatus(ORT_FAIL, "fxopt: out of memory");
  *kernel = (RowKernel){api, has_norm, fxopt_cpu_level(), (float)zero, eps};
  *made = kernel;
  return 0;
}

static Status *create_quantize(const CustomOp *op, Api api, const void *info, void **made) {
  (void)op;
  return create_rows(info, api, 0, made);
}

static Status *create_norm(const CustomOp *op, Api api, const void *info, void **made) {
  (void)op;
  return create_rows(info, api, 1, made);
}

static void row_part(void *given, usize index) {
  RowWork *work = given;
  i64 first = (i64)index * CHUNK, at = first * work->form->size;
  i32 rows = (i32)(work->rows - first < CHUNK ? work->rows - first : CHUNK);
  work->form->run(&rows, work->in[ROW_X] + at, work->in[ROW_GAMMA], work->in[ROW_BETA], work->in[ROW_INVERSE],
                  &work->kernel->zero, work->codes + at);
}

static Status *compute_rows(void *given, void *context) {
  const RowKernel *kernel = given;
  Api api = kernel->api;
  RowWork work = {.kernel = kernel, .rows = 1};
  i64 sizes[RANK], length[RANK];
  usize rank, one_rank;
  const void *value;
  void *data, *result;
  CHECK(KernelContext_GetInput(context, ROW_X, &value));
  CHECK(GetTensorMutableData((void *)value, &data));
  CHECK(shape_of(api, value, sizes, &rank));
  work.in[ROW_X] = data;
  for (usize d = 0; d + 1 < rank; d++) work.rows *= sizes[d];
  for (i32 i = 0; rank && i < ROW_COUNT; i++) {
    const RowForm *form = &ROW_KERNELS[i];
    if (form->size != sizes[rank - 1] || form->has_norm != kernel->has_norm || form->level > kernel->level) continue;
    if (form->has_norm && form->eps != kernel->eps) continue;
    if (!work.form || work.form->level < form->level) work.form = form;
  }
  if (!work.form) return CreateStatus(ORT_INVALID_ARGUMENT, "fxopt: this library has no kernel for rows of this size");
  for (usize i = ROW_INVERSE; i < (kernel->has_norm ? ROW_INPUTS : ROW_GAMMA); i++) {
    CHECK(KernelContext_GetInput(context, i, &value));
    CHECK(shape_of(api, value, length, &one_rank));
    if (one_rank != 1 || length[0] != work.form->size)
      return CreateStatus(ORT_INVALID_ARGUMENT, "fxopt: inverse, gamma and beta have one value per channel");
    CHECK(GetTensorMutableData((void *)value, &data));
    work.in[i] = data;
  }
  CHECK(KernelContext_GetOutput(context, 0, sizes, rank, &result));
  CHECK(GetTensorMutableData(result, (void **)&work.codes));
  usize parts = (usize)((work.rows + CHUNK - 1) / CHUNK);
  if (parts > 1) return KernelContext_ParallelFor(context, row_part, parts, 0, &work);
  row_part(&work, 0);
  return 0;
}
