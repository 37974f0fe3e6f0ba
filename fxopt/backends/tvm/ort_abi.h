/* The part of ONNX Runtime's C API that a custom operator needs. The API is a table of function pointers whose order
   never changes (entries are only appended), so that a function is its place in the table. Version 17 and later. */
#pragma once

typedef unsigned char u8;
typedef int i32;
typedef long i64;
typedef unsigned long usize;
_Static_assert(sizeof(i64) == 8 && sizeof(i32) == 4 && sizeof(void *) == 8, "64-bit System V ABI");

enum { ORT_VERSION = 17, ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2 };
enum { TYPE_UNDEFINED = 0, TYPE_FLOAT = 1, TYPE_UINT8 = 2, TYPE_INT8 = 3 };
enum { REQUIRED = 0, OPTIONAL = 1 };

typedef void Status;  /* NULL: success */
typedef void *const *Api;

typedef struct {
  Api (*GetApi)(unsigned version);
  const char *(*GetVersionString)(void);
} ApiBase;

typedef struct CustomOp {
  unsigned version;
  void *(*CreateKernel)(const struct CustomOp *, Api, const void *info);
  const char *(*GetName)(const struct CustomOp *);
  const char *(*GetExecutionProviderType)(const struct CustomOp *);
  i32 (*GetInputType)(const struct CustomOp *, usize);
  usize (*GetInputTypeCount)(const struct CustomOp *);
  i32 (*GetOutputType)(const struct CustomOp *, usize);
  usize (*GetOutputTypeCount)(const struct CustomOp *);
  void (*KernelCompute)(void *, void *context);
  void (*KernelDestroy)(void *);
  i32 (*GetInputCharacteristic)(const struct CustomOp *, usize);
  i32 (*GetOutputCharacteristic)(const struct CustomOp *, usize);
  i32 (*GetInputMemoryType)(const struct CustomOp *, usize);
  i32 (*GetVariadicInputMinArity)(const struct CustomOp *);
  i32 (*GetVariadicInputHomogeneity)(const struct CustomOp *);
  i32 (*GetVariadicOutputMinArity)(const struct CustomOp *);
  i32 (*GetVariadicOutputHomogeneity)(const struct CustomOp *);
  Status *(*CreateKernelV2)(const struct CustomOp *, Api, const void *info, void **kernel);
  Status *(*KernelComputeV2)(void *, void *context);
  Status *(*InferOutputShapeFn)(const struct CustomOp *, void *context);
  i32 (*GetStartVersion)(const struct CustomOp *);
  i32 (*GetEndVersion)(const struct CustomOp *);
  void *unused[4];  /* version 18: in-place and alias maps */
} CustomOp;

#define ORT(place, result, ...) ((result(*)(__VA_ARGS__))api[place])
#define CreateStatus ORT(0, Status *, i32 code, const char *message)
#define CreateCustomOpDomain ORT(26, Status *, const char *name, void **domain)
#define CustomOpDomain_Add ORT(27, Status *, void *domain, const CustomOp *)
#define AddCustomOpDomain ORT(28, Status *, void *options, void *domain)
#define GetTensorMutableData ORT(51, Status *, void *value, void **data)
#define GetTensorElementType ORT(60, Status *, const void *shape, i32 *type)
#define GetDimensionsCount ORT(61, Status *, const void *shape, usize *count)
#define GetDimensions ORT(62, Status *, const void *shape, i64 *sizes, usize count)
#define GetTensorTypeAndShape ORT(65, Status *, const void *value, void **shape)
#define KernelInfoGetAttribute_float ORT(85, Status *, const void *info, const char *name, float *value)
#define KernelInfoGetAttribute_int64 ORT(86, Status *, const void *info, const char *name, i64 *value)
#define KernelContext_GetInput ORT(90, Status *, const void *context, usize index, const void **value)
#define KernelContext_GetOutput \
  ORT(91, Status *, void *context, usize index, const i64 *sizes, usize count, void **value)
#define ReleaseTensorTypeAndShapeInfo ORT(99, void, void *shape)
#define ReleaseCustomOpDomain ORT(101, void, void *domain)
#define KernelInfoGetConstantInput_tensor \
  ORT(249, Status *, const void *info, usize index, i32 *is_constant, const void **value)
#define KernelContext_ParallelFor \
  ORT(274, Status *, const void *context, void (*run)(void *, usize), usize total, usize batches, void *data)
