//! Products of many rows by cuBLASLt, which is opened if it is there.
//!
//! ```text
//! ours, row-major       out [m, n] = x [m, k] * w [n, k]^T
//! cuBLAS, by columns    D (n x m)  = A^T * B       A (k x n) = w, B (k x m) = x: the same bytes
//! ```
//!
//! Which of its kernels computes a shape is asked once and kept. Numbers of rows come in multiples of `LARGE_UNIT`, so there are
//! few shapes. In fp8 each channel and each row has a scale. Where the library takes one a matrix only, which depends on the
//! chip and is asked of it, the product is computed without any ([`Blas::bare`]), and `scale_product` follows.

use std::collections::HashMap;
use std::ffi::c_void;

use cudarc::cublas::sys::cublasOperation_t;
use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;

use super::gemm::{Sink, Weight};
use super::launch::{Fp8, Ptr};
use crate::base::{Error, Result};

/// Bytes that a kernel may use for itself: what the library recommends for Hopper.
pub(super) const WORKSPACE: usize = 32 << 20;

/// The library, and what it said about each shape.
pub(super) struct Blas {
    handle: sys::cublasLtHandle_t,
    workspace: u64,
    /// None: it has nothing for such a shape.
    plans: HashMap<Shape, Option<Plan>>,
}

// SAFETY: handles and descriptors may be used by any thread, one at a time.
unsafe impl Send for Blas {}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Shape {
    fp8: bool,
    /// Whether the library multiplies with the scales.
    scaled: bool,
    m: usize,
    n: usize,
    k: usize,
    out_stride: usize,
    wide: bool,
    add: bool,
}

struct Plan {
    product: sys::cublasLtMatmulDesc_t,
    w: sys::cublasLtMatrixLayout_t,
    x: sys::cublasLtMatrixLayout_t,
    out: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

fn failed(what: &str, error: CublasError) -> Error {
    Error::internal(format!("cuBLASLt: {what}: {error}"))
}

impl Blas {
    /// The library with [`WORKSPACE`] bytes at `workspace`, or `None` where it is not installed.
    pub(super) fn open(workspace: u64) -> Result<Option<Self>> {
        // SAFETY: only asks whether the library can be opened. Without it every other call would panic.
        if !unsafe { sys::is_culib_present() } {
            return Ok(None);
        }
        let handle = result::create_handle().map_err(|error| failed("cannot start", error))?;
        Ok(Some(Self { handle, workspace, plans: HashMap::new() }))
    }

    /// Whether it multiplies in fp8, but not with a scale a channel and a row.
    pub(super) fn leaves_scales(&self) -> bool {
        let shape = Shape { fp8: true, scaled: true, m: 64, n: 256, k: 256, out_stride: 256, wide: true, add: false };
        // Nothing is computed: any address will do.
        let scales = Some((self.workspace, self.workspace));
        Plan::new(self.handle, shape, scales).is_err()
            && Plan::new(self.handle, Shape { scaled: false, ..shape }, None).is_ok()
    }

    /// `x * w^T` into `out` of `m` rows; false where the library cannot.
    pub(super) fn product(
        &mut self,
        (m, n, k): (usize, usize, usize),
        weight: Weight,
        out: Sink,
        out_stride: usize,
        stream: *mut c_void,
    ) -> Result<bool> {
        let (fp8, w, x, scales) = match weight {
            Weight::Bf16(w, x) => {
                w.needs("w", n * k, 16)?;
                x.needs("x", m * k, 16)?;
                (false, w.address(), x.address(), None)
            }
            Weight::Fp8(w, x) => {
                w.data.needs("w", n * k, 16)?;
                w.scales.needs("scales of w", n, 4)?;
                x.data.needs("x", m * k, 16)?;
                x.scales.needs("scales of x", m, 4)?;
                (true, w.data.address(), x.data.address(), Some((w.scales.address(), x.scales.address())))
            }
            Weight::Q4(..) => return Ok(false),
        };
        out.needs((m - 1) * out_stride + n, 16)?;
        let (to, wide, add) = match out {
            Sink::Set(out) => (out.address(), false, false),
            Sink::Add(out) => (out.address(), false, true),
            Sink::Wide(out) => (out.address(), true, false),
        };
        self.compute(Shape { fp8, scaled: fp8, m, n, k, out_stride, wide, add }, (w, x), scales, to, stream)
    }

    /// The product of what is in fp8, without scales, into `out [m, n]`; false where the library cannot.
    pub(super) fn bare(
        &mut self,
        (m, n, k): (usize, usize, usize),
        w: Ptr<Fp8>,
        x: Ptr<Fp8>,
        out: Ptr<f32>,
        stream: *mut c_void,
    ) -> Result<bool> {
        w.needs("w", n * k, 16)?;
        x.needs("x", m * k, 16)?;
        out.needs("out", m * n, 16)?;
        let shape = Shape { fp8: true, scaled: false, m, n, k, out_stride: n, wide: true, add: false };
        self.compute(shape, (w.address(), x.address()), None, out.address(), stream)
    }

    fn compute(
        &mut self,
        shape: Shape,
        (w, x): (u64, u64),
        scales: Option<(u64, u64)>,
        to: u64,
        stream: *mut c_void,
    ) -> Result<bool> {
        let Shape { fp8, scaled, m, n, k, add, .. } = shape;
        let handle = self.handle;
        let plan = self.plans.entry(shape).or_insert_with(|| match Plan::new(handle, shape, scales) {
            Ok(plan) => Some(plan),
            Err(error) => {
                tracing::warn!(%error, fp8, scaled, m, n, k, "cuBLASLt has no kernel for a product: it is computed in another way");
                None
            }
        });
        let Some(plan) = plan else { return Ok(false) };
        if let Some((w, x)) = scales {
            plan.scales(w, x).map_err(|error| failed("scales", error))?;
        }
        let (one, beta) = (1f32, if add { 1f32 } else { 0f32 });
        // SAFETY: descriptors of this plan, memory as checked above, and a workspace that only this stream uses.
        let done = unsafe {
            result::matmul(
                handle,
                plan.product,
                (&raw const one).cast(),
                (&raw const beta).cast(),
                w as *const c_void,
                plan.w,
                x as *const c_void,
                plan.x,
                to as *const c_void,
                plan.out,
                to as *mut c_void,
                plan.out,
                &raw const plan.algorithm,
                self.workspace as *mut c_void,
                WORKSPACE,
                stream.cast(),
            )
        };
        done.map(|()| true).map_err(|error| failed(&format!("{m} rows times {n} x {k}"), error))
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        self.plans.clear();
        // SAFETY: made by `open`, and nobody has it any more.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

impl Plan {
    fn new(
        handle: sys::cublasLtHandle_t,
        shape: Shape,
        scales: Option<(u64, u64)>,
    ) -> std::result::Result<Self, CublasError> {
        let Shape { fp8, scaled: _, m, n, k, out_stride, wide, add: _ } = shape;
        use sys::cudaDataType_t as Type;
        let from = if fp8 { Type::CUDA_R_8F_E4M3 } else { Type::CUDA_R_16BF };
        let to = if wide { Type::CUDA_R_32F } else { Type::CUDA_R_16BF };
        let mut plan = Self {
            product: result::create_matmul_desc(
                sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                sys::cudaDataType_t::CUDA_R_32F,
            )?,
            w: result::create_matrix_layout(from, k as u64, n as u64, k as i64)?,
            x: result::create_matrix_layout(from, k as u64, m as u64, k as i64)?,
            out: result::create_matrix_layout(to, n as u64, m as u64, out_stride as i64)?,
            // SAFETY: plain numbers, written below.
            algorithm: unsafe { std::mem::zeroed() },
        };
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        plan.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, cublasOperation_t::CUBLAS_OP_T)?;
        plan.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSB, cublasOperation_t::CUBLAS_OP_N)?;
        if let Some((w, x)) = scales {
            let each = sys::cublasLtMatmulMatrixScale_t::CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
            plan.set(Attribute::CUBLASLT_MATMUL_DESC_A_SCALE_MODE, each)?;
            plan.set(Attribute::CUBLASLT_MATMUL_DESC_B_SCALE_MODE, each)?;
            plan.scales(w, x)?;
        }
        if fp8 {
            plan.set(Attribute::CUBLASLT_MATMUL_DESC_FAST_ACCUM, 1i8)?;
        }
        let preference = result::create_matmul_pref()?;
        // SAFETY: descriptors that were just made; the preference is not used afterwards.
        unsafe {
            let bytes = WORKSPACE;
            let limit = sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
            let limited =
                result::set_matmul_pref_attribute(preference, limit, (&raw const bytes).cast(), size_of::<usize>());
            let found = limited.and_then(|()| {
                let (w, x, out) = (plan.w, plan.x, plan.out);
                result::get_matmul_algo_heuristic(handle, plan.product, w, x, out, out, preference)
            });
            let _ = result::destroy_matmul_pref(preference);
            plan.algorithm = found?.algo;
        }
        Ok(plan)
    }

    fn set<T>(&self, attribute: sys::cublasLtMatmulDescAttributes_t, value: T) -> std::result::Result<(), CublasError> {
        // SAFETY: this plan's descriptor, and a value of the attribute's size.
        unsafe { result::set_matmul_desc_attribute(self.product, attribute, (&raw const value).cast(), size_of::<T>()) }
    }

    /// One a channel of `w` and one a row of `x`.
    fn scales(&self, w: u64, x: u64) -> std::result::Result<(), CublasError> {
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        self.set(Attribute::CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, w)?;
        self.set(Attribute::CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, x)
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: made by `new`, and nobody has them any more.
        unsafe {
            let _ = result::destroy_matmul_desc(self.product);
            let _ = result::destroy_matrix_layout(self.w);
            let _ = result::destroy_matrix_layout(self.x);
            let _ = result::destroy_matrix_layout(self.out);
        }
    }
}
