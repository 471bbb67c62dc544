//! Graphs of cuDNN's backend interface: tensors, operations, an execution plan.
//!
//! Descriptors live as long as the plan that uses them, and plans are kept for good.

use std::sync::OnceLock;

use cudarc::cudnn::{result as cudnn, sys};
use sys::cudnnBackendAttributeName_t as Attribute;
use sys::cudnnBackendAttributeType_t as Kind;
use sys::cudnnBackendDescriptorType_t as Type;
pub use sys::cudnnDataType_t as DataType;
pub use sys::cudnnPointwiseMode_t as Mode;
pub use sys::cudnnReduceTensorOp_t as Reduce;

use super::cudnn_plan::Plan;
use crate::libraries;

pub(super) type Raw = sys::cudnnBackendDescriptor_t;

pub(super) fn check(status: sys::cudnnStatus_t, what: &str) -> Result<(), String> {
    status.result().map_err(|e| format!("cuDNN {what}: {e:?}"))
}

pub(super) fn create(kind: Type) -> Result<Raw, String> {
    let mut raw: Raw = std::ptr::null_mut();
    // SAFETY: writes one pointer.
    let status = unsafe { sys::cudnnBackendCreateDescriptor(kind, &mut raw) };
    check(status, "descriptor")?;
    Ok(raw)
}

pub(super) fn set<T>(raw: Raw, name: Attribute, kind: Kind, values: &[T]) -> Result<(), String> {
    let (count, from) = (values.len() as i64, values.as_ptr().cast());
    // SAFETY: `kind` says what `values` holds; cuDNN copies them.
    let status = unsafe { sys::cudnnBackendSetAttribute(raw, name, kind, count, from) };
    check(status, &format!("{name:?}"))
}

pub(super) fn finalize(raw: Raw, what: &str) -> Result<(), String> {
    // SAFETY: `raw` is a live descriptor.
    check(unsafe { sys::cudnnBackendFinalize(raw) }, what)
}

/// A tensor of a graph.
#[derive(Clone, Copy, Debug)]
pub struct Node {
    pub(super) id: i64,
    raw: Raw,
    /// Extents.
    pub dims: [i64; 4],
    /// Elements between neighbours.
    pub strides: [i64; 4],
}

/// The handle of the device thread; its stream is set before each use.
pub struct Library {
    pub(super) handle: sys::cudnnHandle_t,
}

impl Library {
    /// Opens libcudnn.
    ///
    /// # Errors
    /// If it is missing or older than 9.10, from which on the graphs here are right.
    pub fn open() -> Result<Self, String> {
        // SAFETY: only asks whether the library can be opened.
        if !unsafe { sys::is_culib_present() } {
            let (package, wheel) = ("cudnn9-cuda-13", "nvidia-cudnn-cu13");
            return Err(libraries::missing("libcudnn", package, wheel));
        }
        // SAFETY: no arguments.
        let version = unsafe { sys::cudnnGetVersion() };
        if version < 91000 {
            return Err(format!("cuDNN {version} is too old, 9.10 is needed"));
        }
        let handle = cudnn::create_handle().map_err(|e| format!("cuDNN handle: {e:?}"))?;
        Ok(Self { handle })
    }
}

/// Whether scores may have a left bound and no right one: from 9.10.2 on, but 9.14.0 is wrong for more than
/// 1024 keys.
pub fn bands_are_right() -> bool {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(|| {
        // SAFETY: only asks whether the library can be opened, then which one it is.
        let version = unsafe { sys::is_culib_present().then(|| sys::cudnnGetVersion()) };
        version.is_some_and(|version| version >= 91002 && version != 91400)
    })
}

/// Where a tensor's values come from.
#[derive(Clone, Copy, PartialEq)]
enum Role {
    Memory,
    Ragged(Raw),
    Between,
    BetweenRagged(Raw),
    Scalar,
}

/// How many rows, columns and inner elements of a product count in each batch entry.
#[derive(Clone, Copy, Debug, Default)]
pub struct Extents {
    /// Rows of a and c.
    pub m: Option<Node>,
    /// Columns of b and c.
    pub n: Option<Node>,
    /// Columns of a, rows of b.
    pub k: Option<Node>,
}

/// A graph under construction.
pub struct Graph<'a> {
    library: &'a Library,
    operations: Vec<Raw>,
    next: i64,
    /// Scalars that operations read from the host, and their ids.
    scalars: Vec<(i64, Box<f32>)>,
}

impl<'a> Graph<'a> {
    /// Without operations.
    pub fn new(library: &'a Library) -> Self {
        Self {
            library,
            operations: vec![],
            next: 1,
            scalars: vec![],
        }
    }

    fn node(
        &mut self,
        dtype: DataType,
        dims: [i64; 4],
        strides: [i64; 4],
        role: Role,
    ) -> Result<Node, String> {
        use Attribute::*;
        let raw = create(Type::CUDNN_BACKEND_TENSOR_DESCRIPTOR)?;
        let id = self.next;
        self.next += 1;
        set(
            raw,
            CUDNN_ATTR_TENSOR_DATA_TYPE,
            Kind::CUDNN_TYPE_DATA_TYPE,
            &[dtype],
        )?;
        set(
            raw,
            CUDNN_ATTR_TENSOR_DIMENSIONS,
            Kind::CUDNN_TYPE_INT64,
            &dims,
        )?;
        set(
            raw,
            CUDNN_ATTR_TENSOR_STRIDES,
            Kind::CUDNN_TYPE_INT64,
            &strides,
        )?;
        set(
            raw,
            CUDNN_ATTR_TENSOR_UNIQUE_ID,
            Kind::CUDNN_TYPE_INT64,
            &[id],
        )?;
        set(
            raw,
            CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT,
            Kind::CUDNN_TYPE_INT64,
            &[16i64],
        )?;
        if matches!(role, Role::Between | Role::BetweenRagged(_)) {
            set(
                raw,
                CUDNN_ATTR_TENSOR_IS_VIRTUAL,
                Kind::CUDNN_TYPE_BOOLEAN,
                &[true],
            )?;
        }
        if role == Role::Scalar {
            set(
                raw,
                CUDNN_ATTR_TENSOR_IS_BY_VALUE,
                Kind::CUDNN_TYPE_BOOLEAN,
                &[true],
            )?;
        }
        if let Role::Ragged(offsets) | Role::BetweenRagged(offsets) = role {
            set(
                raw,
                CUDNN_ATTR_TENSOR_RAGGED_OFFSET_DESC,
                Kind::CUDNN_TYPE_BACKEND_DESCRIPTOR,
                &[offsets],
            )?;
        }
        finalize(raw, "tensor")?;
        Ok(Node {
            id,
            raw,
            dims,
            strides,
        })
    }

    /// A tensor in memory.
    pub fn tensor(
        &mut self,
        dtype: DataType,
        dims: [i64; 4],
        strides: [i64; 4],
    ) -> Result<Node, String> {
        self.node(dtype, dims, strides, Role::Memory)
    }

    /// A tensor in memory whose batch entry b begins at element `offsets[b]`.
    pub fn ragged(
        &mut self,
        dtype: DataType,
        dims: [i64; 4],
        strides: [i64; 4],
        offsets: Node,
    ) -> Result<Node, String> {
        self.node(dtype, dims, strides, Role::Ragged(offsets.raw))
    }

    /// An intermediate result, dense unless its consumer says otherwise.
    pub fn between(
        &mut self,
        dtype: DataType,
        dims: [i64; 4],
        strides: [i64; 4],
    ) -> Result<Node, String> {
        self.node(dtype, dims, strides, Role::Between)
    }

    /// [`Graph::between`] with offsets.
    pub fn between_ragged(
        &mut self,
        dtype: DataType,
        dims: [i64; 4],
        strides: [i64; 4],
        offsets: Node,
    ) -> Result<Node, String> {
        self.node(dtype, dims, strides, Role::BetweenRagged(offsets.raw))
    }

    /// A scalar f32.
    pub fn scalar(&mut self, value: f32) -> Result<Node, String> {
        let node = self.node(DataType::CUDNN_DATA_FLOAT, [1; 4], [1; 4], Role::Scalar)?;
        self.scalars.push((node.id, Box::new(value)));
        Ok(node)
    }

    fn operation(
        &mut self,
        raw: Raw,
        what: &str,
        edges: &[(Attribute, Raw)],
    ) -> Result<(), String> {
        for &(name, end) in edges {
            set(raw, name, Kind::CUDNN_TYPE_BACKEND_DESCRIPTOR, &[end])?;
        }
        finalize(raw, what)?;
        self.operations.push(raw);
        Ok(())
    }

    /// c = a b, within `extents`.
    pub fn matmul(&mut self, a: Node, b: Node, c: Node, extents: Extents) -> Result<(), String> {
        use Attribute::*;
        let how = create(Type::CUDNN_BACKEND_MATMUL_DESCRIPTOR)?;
        let f32 = [DataType::CUDNN_DATA_FLOAT];
        set(
            how,
            CUDNN_ATTR_MATMUL_COMP_TYPE,
            Kind::CUDNN_TYPE_DATA_TYPE,
            &f32,
        )?;
        finalize(how, "product")?;
        let raw = create(Type::CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR)?;
        let mut edges = vec![
            (CUDNN_ATTR_OPERATION_MATMUL_DESC, how),
            (CUDNN_ATTR_OPERATION_MATMUL_ADESC, a.raw),
            (CUDNN_ATTR_OPERATION_MATMUL_BDESC, b.raw),
            (CUDNN_ATTR_OPERATION_MATMUL_CDESC, c.raw),
        ];
        for (name, extent) in [
            (CUDNN_ATTR_OPERATION_MATMUL_GEMM_M_OVERRIDE_DESC, extents.m),
            (CUDNN_ATTR_OPERATION_MATMUL_GEMM_N_OVERRIDE_DESC, extents.n),
            (CUDNN_ATTR_OPERATION_MATMUL_GEMM_K_OVERRIDE_DESC, extents.k),
        ] {
            edges.extend(extent.map(|node| (name, node.raw)));
        }
        self.operation(raw, "product", &edges)
    }

    /// y = mode(x, b, t), computed in `precision`; `axis` for index generation.
    #[allow(clippy::too_many_arguments)] // the descriptor's fields
    pub fn pointwise(
        &mut self,
        mode: Mode,
        precision: DataType,
        axis: Option<i64>,
        x: Node,
        b: Option<Node>,
        t: Option<Node>,
        y: Node,
    ) -> Result<(), String> {
        use Attribute::*;
        let how = create(Type::CUDNN_BACKEND_POINTWISE_DESCRIPTOR)?;
        set(
            how,
            CUDNN_ATTR_POINTWISE_MODE,
            Kind::CUDNN_TYPE_POINTWISE_MODE,
            &[mode],
        )?;
        set(
            how,
            CUDNN_ATTR_POINTWISE_MATH_PREC,
            Kind::CUDNN_TYPE_DATA_TYPE,
            &[precision],
        )?;
        if let Some(axis) = axis {
            set(
                how,
                CUDNN_ATTR_POINTWISE_AXIS,
                Kind::CUDNN_TYPE_INT64,
                &[axis],
            )?;
        }
        finalize(how, &format!("{mode:?}"))?;
        let raw = create(Type::CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR)?;
        let mut edges = vec![
            (CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR, how),
            (CUDNN_ATTR_OPERATION_POINTWISE_XDESC, x.raw),
            (CUDNN_ATTR_OPERATION_POINTWISE_YDESC, y.raw),
        ];
        edges.extend(b.map(|b| (CUDNN_ATTR_OPERATION_POINTWISE_BDESC, b.raw)));
        edges.extend(t.map(|t| (CUDNN_ATTR_OPERATION_POINTWISE_TDESC, t.raw)));
        self.operation(raw, &format!("{mode:?}"), &edges)
    }

    /// y = mode over the dimensions in which y has extent 1.
    pub fn reduce(&mut self, mode: Reduce, x: Node, y: Node) -> Result<(), String> {
        use Attribute::*;
        let how = create(Type::CUDNN_BACKEND_REDUCTION_DESCRIPTOR)?;
        let f32 = [DataType::CUDNN_DATA_FLOAT];
        set(
            how,
            CUDNN_ATTR_REDUCTION_COMP_TYPE,
            Kind::CUDNN_TYPE_DATA_TYPE,
            &f32,
        )?;
        let kind = Kind::CUDNN_TYPE_REDUCTION_OPERATOR_TYPE;
        set(how, CUDNN_ATTR_REDUCTION_OPERATOR, kind, &[mode])?;
        finalize(how, "reduction")?;
        let raw = create(Type::CUDNN_BACKEND_OPERATION_REDUCTION_DESCRIPTOR)?;
        let edges = [
            (CUDNN_ATTR_OPERATION_REDUCTION_DESC, how),
            (CUDNN_ATTR_OPERATION_REDUCTION_XDESC, x.raw),
            (CUDNN_ATTR_OPERATION_REDUCTION_YDESC, y.raw),
        ];
        self.operation(raw, "reduction", &edges)
    }

    /// y is x seen with y's extents and strides.
    pub fn reshape(&mut self, x: Node, y: Node) -> Result<(), String> {
        use Attribute::*;
        let raw = create(Type::CUDNN_BACKEND_OPERATION_RESHAPE_DESCRIPTOR)?;
        let edges = [
            (CUDNN_ATTR_OPERATION_RESHAPE_XDESC, x.raw),
            (CUDNN_ATTR_OPERATION_RESHAPE_YDESC, y.raw),
        ];
        self.operation(raw, "reshape", &edges)
    }

    /// The first plan among cuDNN's suggestions that works. Its memory tensors are `bound`, in the
    /// order in which [`Plan::run`] gets their addresses.
    pub fn plan(self, bound: &[Node]) -> Result<Plan, String> {
        use Attribute::*;
        let handle = [self.library.handle];
        let graph = create(Type::CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR)?;
        let descriptor = Kind::CUDNN_TYPE_BACKEND_DESCRIPTOR;
        set(
            graph,
            CUDNN_ATTR_OPERATIONGRAPH_HANDLE,
            Kind::CUDNN_TYPE_HANDLE,
            &handle,
        )?;
        set(
            graph,
            CUDNN_ATTR_OPERATIONGRAPH_OPS,
            descriptor,
            &self.operations,
        )?;
        finalize(graph, "graph")?;
        let advice = create(Type::CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR)?;
        set(
            advice,
            CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH,
            descriptor,
            &[graph],
        )?;
        let mode = [sys::cudnnBackendHeurMode_t::CUDNN_HEUR_MODE_A];
        set(
            advice,
            CUDNN_ATTR_ENGINEHEUR_MODE,
            Kind::CUDNN_TYPE_HEUR_MODE,
            &mode,
        )?;
        finalize(advice, "advice")?;
        let mut configs = [std::ptr::null_mut(); 8];
        for config in &mut configs {
            *config = create(Type::CUDNN_BACKEND_ENGINECFG_DESCRIPTOR)?;
        }
        let mut found = 0;
        // SAFETY: room for eight descriptors, which cuDNN fills.
        let status = unsafe {
            sys::cudnnBackendGetAttribute(
                advice,
                CUDNN_ATTR_ENGINEHEUR_RESULTS,
                descriptor,
                configs.len() as i64,
                &mut found,
                configs.as_mut_ptr().cast(),
            )
        };
        check(status, "engines")?;
        let mut last = "cuDNN suggests no engine".to_string();
        for &config in &configs[..(found.max(0) as usize).min(configs.len())] {
            let plan = create(Type::CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR)?;
            let made = set(
                plan,
                CUDNN_ATTR_EXECUTION_PLAN_HANDLE,
                Kind::CUDNN_TYPE_HANDLE,
                &handle,
            )
            .and_then(|()| {
                set(
                    plan,
                    CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG,
                    descriptor,
                    &[config],
                )
            })
            .and_then(|()| finalize(plan, "plan"));
            match made {
                Err(error) => last = error,
                Ok(()) => return Plan::new(plan, bound, self.scalars),
            }
        }
        Err(last)
    }
}
