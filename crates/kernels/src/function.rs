//! Differentiable operations with a hand-written backward, on any backend.
//!
//! Burn's tape differentiates compositions of its own operations. A [`Function`] replaces such a
//! composition by one node: its forward runs untracked on plain tensors, says what to keep, and its
//! backward is written out. That saves the intermediate tensors and lets a fused kernel stand in for
//! either direction.

use std::fmt::Debug;

use burn::backend::Backend;
#[cfg(feature = "cuda")]
use burn::backend::Cube;
use burn::backend::autodiff::{
    Autodiff,
    checkpoint::{base::Checkpointer, strategy::NoCheckpointing},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn::backend::{BackendTensor, DispatchKindConversion, DispatchTensor, Flex};
use burn::tensor::{Device, Tensor};

/// A float tensor of any rank.
#[derive(Clone, Debug)]
pub struct Value(DispatchTensor);

impl Value {
    /// The same tensor with its rank in the type.
    ///
    /// # Panics
    /// In debug builds, if the tensor does not have rank `D`.
    pub fn tensor<const D: usize>(self) -> Tensor<D> {
        let tensor = Tensor::from_dispatch(self.0);
        debug_assert_eq!(Tensor::<D>::shape(&tensor).num_dims(), D);
        tensor
    }

    /// Where the tensor lives. Needs no rank.
    pub fn device(&self) -> Device {
        Tensor::<1>::from_dispatch(self.0.clone()).device()
    }

    fn is_autodiff(&self) -> bool {
        self.device().is_autodiff()
    }
}

impl<const D: usize> From<Tensor<D>> for Value {
    fn from(tensor: Tensor<D>) -> Self {
        Self(tensor.into_dispatch())
    }
}

/// What a forward pass hands back.
#[derive(Debug)]
pub struct Forward<S> {
    /// The differentiable output.
    pub output: Value,
    /// Further outputs, which carry no gradient.
    pub extra: Vec<Value>,
    /// What the backward pass needs; dropped at once when nothing is tracked.
    pub saved: S,
}

/// A differentiable operation on `N` float tensors.
///
/// Integers, layouts and scalars are fields of the implementing type.
pub trait Function<const N: usize>: Debug + Send + Sized + 'static {
    /// What the forward pass keeps for the backward pass.
    type Saved: Clone + Debug + Send + 'static;

    /// The result and what to keep. The inputs are not tracked.
    fn forward(&self, inputs: [Value; N]) -> Forward<Self::Saved>;

    /// [`Function::forward`] where nothing is tracked: the output and the further ones. For a form that has
    /// less to write where there is no backward pass.
    fn forward_only(&self, inputs: [Value; N]) -> (Value, Vec<Value>) {
        let done = self.forward(inputs);
        (done.output, done.extra)
    }

    /// The gradient with respect to each input, given that of the output.
    /// An input whose `wanted` is false needs none.
    fn backward(self, saved: Self::Saved, grad: Value, wanted: [bool; N]) -> [Option<Value>; N];
}

/// Runs `function`, recording it on the tape if an input is on an autodiff device.
pub fn apply<F: Function<N>, const N: usize>(function: F, inputs: [Value; N]) -> Value {
    apply_with_extra(function, inputs).0
}

/// [`apply`], and the outputs that carry no gradient.
///
/// # Panics
/// If the inputs are on a backend other than Flex or, with feature `cuda`, CubeCL's.
pub fn apply_with_extra<F: Function<N>, const N: usize>(
    function: F,
    inputs: [Value; N],
) -> (Value, Vec<Value>) {
    if !inputs.iter().any(Value::is_autodiff) {
        return function.forward_only(inputs);
    }
    // An untracked input takes part as a constant.
    let inputs = inputs.map(|v| match v.is_autodiff() {
        true => v,
        false => Tensor::<1>::from_dispatch(v.0).autodiff().into(),
    });
    #[cfg(feature = "cuda")]
    if on_backend::<Cube>(&inputs[0]) {
        return record::<Cube, F, N>(function, inputs);
    }
    if on_backend::<Flex>(&inputs[0]) {
        return record::<Flex, F, N>(function, inputs);
    }
    panic!("operations of this crate run on the Flex and CUDA backends only");
}

fn on_backend<B: Backend>(value: &Value) -> bool
where
    DispatchTensor: DispatchKindConversion<Autodiff<B>>,
{
    <DispatchTensor as DispatchKindConversion<Autodiff<B>>>::try_into_backend(value.0.clone())
        .is_ok()
}

#[derive(Debug)]
struct Node<F>(F);

impl<B, F, const N: usize> Backward<B, N> for Node<F>
where
    B: Backend,
    F: Function<N>,
    DispatchTensor: DispatchKindConversion<B>,
{
    type State = F::Saved;

    fn backward(self, ops: Ops<F::Saved, N>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = wrap::<B>(grads.consume::<B>(&ops.node));
        let wanted = ops.parents.each_ref().map(Option::is_some);
        let computed = self.0.backward(ops.state, grad, wanted);
        for (parent, grad) in ops.parents.into_iter().zip(computed) {
            if let (Some(parent), Some(grad)) = (parent, grad) {
                grads.register::<B>(parent.id, unwrap::<B>(grad));
            }
        }
    }
}

fn record<B, F, const N: usize>(function: F, inputs: [Value; N]) -> (Value, Vec<Value>)
where
    B: Backend,
    F: Function<N>,
    DispatchTensor: DispatchKindConversion<B> + DispatchKindConversion<Autodiff<B>>,
{
    let tracked = inputs.map(unwrap::<Autodiff<B>>);
    let nodes = tracked.each_ref().map(|t| t.node());
    let done = function.forward(tracked.map(|t| wrap::<B>(t.into_primitive())));
    let output = unwrap::<B>(done.output);
    let prepared = Backward::<B, N>::prepare::<NoCheckpointing>(Node(function), nodes);
    let output = match prepared.compute_bound().stateful() {
        OpsKind::Tracked(prep) => prep.finish(done.saved, output),
        OpsKind::UnTracked(prep) => prep.finish(output),
    };
    (wrap::<Autodiff<B>>(output), done.extra)
}

fn wrap<B: Backend>(primitive: B::FloatTensorPrimitive) -> Value
where
    DispatchTensor: DispatchKindConversion<B>,
{
    Value(<DispatchTensor as DispatchKindConversion<B>>::from_backend(
        BackendTensor::Float(primitive),
    ))
}

fn unwrap<B: Backend>(value: Value) -> B::FloatTensorPrimitive
where
    DispatchTensor: DispatchKindConversion<B>,
{
    <DispatchTensor as DispatchKindConversion<B>>::try_into_backend(value.0)
        .expect("the tensors of one operation live on one backend")
        .float()
}
