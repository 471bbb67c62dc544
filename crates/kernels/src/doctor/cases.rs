//! The operations with sizes that no tile divides.

use std::sync::Arc;

use burn::tensor::{DType, Device, Int, Tensor, TensorData};

use super::compare::Op;
use super::mirror::Mirror;
use crate::context::{Context, ContextSettings, StateExchange};
use crate::dtype::cast;
use crate::ttt::{ScanSpec, chunk_conv, fast_weight_scan};
use crate::{
    AttentionSpec, Packing, attention, embedding, linear, linear_cross_entropy, rms_norm, rope,
    swiglu,
};

/// One rounding to bf16 (2⁻⁹ at most, 2⁻⁹/√3 typically) with room for a second one.
const ROUNDED: f64 = 4e-3;

/// Several roundings on the way: the probabilities of attention, the weights of the scan.
pub(super) const CHAIN: f64 = 1.2e-2;

pub(super) fn op(
    name: &str,
    inputs: &[(usize, f64)],
    bound: f64,
    run: impl Fn(&[Tensor<1>]) -> Tensor<1> + 'static,
) -> Op {
    Op {
        name: name.into(),
        inputs: inputs.to_vec(),
        bound,
        run: Box::new(run),
    }
}

pub(super) fn flat<const D: usize>(tensor: Tensor<D>) -> Tensor<1> {
    let count = tensor.dims().iter().product::<usize>();
    tensor.reshape([count])
}

/// Packed rows of `length` tokens: the first row in three documents, the others whole.
pub(super) fn packed(rows: usize, length: usize) -> Packing {
    let mut starts = vec![vec![0]; rows];
    starts[0] = vec![0, length / 5, length / 2 + 1];
    Packing::new(length, starts).unwrap_or_else(|_| Packing::whole_rows(rows, length))
}

/// Every operation.
pub fn all() -> Vec<Op> {
    let mut all = vec![
        op(
            "linear 193×96 → 136",
            &[(193 * 96, 1.0), (136 * 96, 0.1)],
            ROUNDED,
            |x| {
                let t: Tensor<2> = x[0].clone().reshape([193, 96]);
                flat(linear(t, x[1].clone().reshape([136, 96])))
            },
        ),
        op(
            "linear, transposed weight",
            &[(77 * 64, 1.0), (64 * 64, 0.1)],
            ROUNDED,
            |x| {
                let t: Tensor<2> = x[0].clone().reshape([77, 64]);
                let w: Tensor<2> = x[1].clone().reshape([64, 64]);
                flat(linear(t, w.transpose()))
            },
        ),
        op(
            "swiglu, 1003 elements",
            &[(1003, 1.0), (1003, 1.0)],
            ROUNDED,
            |x| swiglu(x[0].clone(), x[1].clone()),
        ),
        rope_case(2, 33, 3, 64),
        rope_case(1, 70, 2, 128),
        op(
            "cross-entropy 67×64, 1000 classes",
            &[(67 * 64, 1.0), (1000 * 64, 0.2)],
            ROUNDED * 2.0,
            |x| {
                let ids = (0..67).map(|i| if i % 7 == 3 { -1 } else { i * 131 % 1000 });
                let labels = ints(ids.collect(), &plain(&x[0]));
                let h: Tensor<2> = x[0].clone().reshape([67, 64]);
                linear_cross_entropy(h, x[1].clone().reshape([1000, 64]), labels, 0.5)
            },
        ),
        embedding_case(
            "50 rows of 64",
            (50, 64),
            (0..310).map(|i| i * i % 41).collect(),
        ),
        // As in text: one row for a third of the tokens, in several pieces of them, and many for one or none.
        embedding_case(
            "4000 rows of 328, one frequent",
            (4000, 328),
            (0..3100)
                .map(|i| if i % 3 == 0 { 17 } else { i * 7 % 3989 })
                .collect(),
        ),
    ];
    for (rows, width) in [(37, 1024), (501, 128), (9, 2560), (5, 8192)] {
        let name = format!("rms_norm {rows}×{width}");
        let run = move |x: &[Tensor<1>]| {
            let t: Tensor<2> = x[0].clone().reshape([rows, width]);
            flat(rms_norm(t, x[1].clone(), 1e-6))
        };
        all.push(op(
            &name,
            &[(rows * width, 1.0), (width, 1.0)],
            ROUNDED,
            run,
        ));
    }
    for (name, packing) in [
        ("whole rows", Packing::whole_rows(2, 70)),
        ("documents", packed(2, 70)),
    ] {
        let rows = packing.clone();
        let run = move |x: &[Tensor<1>]| {
            let t: Tensor<3> = x[0].clone().reshape([2, 70, 64]);
            flat(chunk_conv(t, x[1].clone().reshape([64, 1, 5]), &rows, 16))
        };
        let inputs = [(2 * 70 * 64, 1.0), (64 * 5, 1.0)];
        all.push(op(&format!("convolution, {name}"), &inputs, ROUNDED, run));
        // Chunks of 2 make more pieces than a group holds.
        all.extend([16, 2].map(|chunk| scan_case(name, &packing, chunk)));
    }
    // More than one block of the weight's gradient, none of them full.
    let run = |x: &[Tensor<1>]| {
        let t: Tensor<3> = x[0].clone().reshape([2, 300, 136]);
        let weight = x[1].clone().reshape([136, 1, 5]);
        flat(chunk_conv(t, weight, &packed(2, 300), 40))
    };
    let inputs = [(2 * 300 * 136, 1.0), (136 * 5, 1.0)];
    all.push(op("convolution, several blocks", &inputs, ROUNDED, run));
    all.extend([16, 2].map(|chunk| shared_scan_case("", chunk)));
    all.push(shared_attention_case("window 80", Some(80), 2));
    all.push(shared_attention_case("keys travel", None, 2));
    all.push(shared_attention_case("heads travel", None, 3));
    all.extend(super::halves::all());
    all.extend(attentions());
    all
}

/// Attention with every kind of mask.
pub fn attentions() -> Vec<Op> {
    let whole = |rows, length| Some(Packing::whole_rows(rows, length));
    let some = |rows, length| Some(packed(rows, length));
    vec![
        attention_case("causal", [2, 200, 4, 2, 64], None, whole(2, 200)),
        attention_case("causal", [1, 256, 2, 2, 128], None, None),
        attention_case("window 48", [2, 200, 4, 4, 64], Some(48), whole(2, 200)),
        attention_case("window 100, groups", [1, 333, 4, 1, 128], Some(100), None),
        attention_case("documents", [2, 200, 4, 2, 64], None, some(2, 200)),
        attention_case(
            "documents, window 30",
            [2, 131, 2, 2, 128],
            Some(30),
            some(2, 131),
        ),
        // Keys before the first query, as ranks that share rows fetch them.
        attention_behind("causal", 130, [2, 330, 4, 2, 64], None, whole(2, 330)),
        attention_behind("window 48", 47, [2, 247, 4, 4, 64], Some(48), whole(2, 247)),
        attention_behind(
            "documents, window 30",
            29,
            [2, 160, 2, 2, 128],
            Some(30),
            some(2, 160),
        ),
        // Keys that end where the queries begin, as strips do; fewer queries than keys; more keys than 1024.
        strip_case(79, [2, 79, 4, 2, 64]),
        strip_case(150, [1, 333, 4, 1, 128]),
        strip_case(1100, [1, 1100, 2, 2, 128]),
    ]
}

/// Attention over more tokens than a GPU takes at once.
pub fn long_attentions() -> Vec<Op> {
    vec![
        attention_case("causal", [1, 2048, 8, 4, 64], None, None),
        attention_case("window 300", [2, 2048, 8, 8, 128], Some(300), None),
        attention_case(
            "documents",
            [2, 2048, 8, 4, 128],
            None,
            Some(packed(2, 2048)),
        ),
        strip_case(2047, [1, 2047, 8, 4, 128]),
    ]
}

/// The part of the rows `whole` that a rank in the middle of three has, and its place.
pub fn middle(whole: &Packing) -> (Packing, Context) {
    let part = whole.length() / 3;
    let mirror = Arc::new(Mirror { rank: 1, size: 3 });
    (whole.part(part..2 * part), Context::new(mirror, settings()))
}

fn settings() -> ContextSettings {
    ContextSettings {
        states: StateExchange::AllGather,
        ..ContextSettings::default()
    }
}

fn shared_attention_case(name: &str, window: Option<usize>, groups: usize) -> Op {
    let (batch, tokens, heads, size) = (2, 200, 6, 64);
    let count = |heads: usize| batch * tokens * heads * size;
    let inputs = [
        (count(heads), 1.0),
        (count(groups), 1.0),
        (count(groups), 1.0),
    ];
    let name = format!("attention of a part of rows, {name}");
    op(&name, &inputs, CHAIN, move |x| {
        let (packing, context) = middle(&packed(batch, 3 * tokens));
        let spec = AttentionSpec {
            window,
            scale: (size as f64).powf(-0.5),
            query_offset: 0,
            packing: Some(packing),
            context: Some(context),
        };
        let shaped = |i: usize, h: usize| x[i].clone().reshape([batch, tokens, h, size]);
        let (q, k, v) = (shaped(0, heads), shaped(1, groups), shaped(2, groups));
        flat(attention(q, k, v, spec))
    })
}

/// The scan alone, over rows as `packing` has them.
pub(super) fn scan_case(name: &str, packing: &Packing, chunk: usize) -> Op {
    let (rows, length) = (packing.rows().len(), packing.length());
    let tokens = rows * length;
    let packing = packing.clone();
    let run = move |x: &[Tensor<1>]| {
        let z: Tensor<3> = x[0].clone().reshape([rows, length, 48]);
        let v: Tensor<3> = x[1].clone().reshape([rows, length, 40]);
        let spec = ScanSpec {
            lr: 0.3,
            chunk,
            clip: None,
            packing: packing.clone(),
            context: None,
        };
        // As in training: W0 in f32.
        let w0 = cast(x[2].clone(), DType::F32).reshape([40, 48]);
        flat(fast_weight_scan(z, v, w0, spec).output)
    };
    let inputs = [(tokens * 48, 1.0), (tokens * 40, 0.1), (40 * 48, 0.3)];
    let name = format!("TTT scan, {name}, chunk {chunk}");
    op(&name, &inputs, CHAIN, run)
}

/// A rank in the middle of three: in its first row a document ends that an earlier rank began, and one
/// begins that a later rank ends; its second row is one document; none of its third crosses an edge.
fn shared_scan_case(note: &str, chunk: usize) -> Op {
    let starts = vec![vec![0, 60, 100, 200], vec![0], vec![0, 80, 160]];
    let whole = Packing::new(240, starts).unwrap_or_else(|_| Packing::whole_rows(3, 240));
    let run = move |x: &[Tensor<1>]| {
        let z: Tensor<3> = x[0].clone().reshape([3, 80, 48]);
        let v: Tensor<3> = x[1].clone().reshape([3, 80, 40]);
        let (packing, context) = middle(&whole);
        let spec = ScanSpec {
            lr: 0.3,
            chunk,
            clip: None,
            packing,
            context: Some(context),
        };
        let w0 = cast(x[2].clone(), DType::F32).reshape([40, 48]);
        flat(fast_weight_scan(z, v, w0, spec).output)
    };
    let inputs = [(3 * 80 * 48, 1.0), (3 * 80 * 40, 0.1), (40 * 48, 0.3)];
    op(
        &format!("TTT scan of a part of rows, chunk {chunk}{note}"),
        &inputs,
        CHAIN,
        run,
    )
}

/// For a scan that may make few products before their turn: of two groups of pieces one has a place.
pub fn few_places() -> (usize, Op) {
    (33 * 40 * 48 * 2, shared_scan_case(", few places", 2))
}

fn embedding_case(name: &str, (vocab, width): (usize, usize), ids: Vec<i64>) -> Op {
    let run = move |x: &[Tensor<1>]| {
        let ids = ints(ids.clone(), &plain(&x[0]));
        let dtype = x[0].dtype();
        let ids = ids.reshape([2, -1]);
        flat(embedding(ids, x[0].clone().reshape([vocab, width]), dtype))
    };
    let name = format!("embedding, {name}");
    op(&name, &[(vocab * width, 1.0)], ROUNDED, run)
}

fn rope_case(batch: usize, tokens: usize, heads: usize, size: usize) -> Op {
    let name = format!("rope {batch}×{tokens}×{heads}×{size}");
    let count = batch * tokens * heads * size;
    op(&name, &[(count, 1.0)], ROUNDED, move |x| {
        let (cos, sin) = angles(&x[0], tokens, size);
        let t: Tensor<4> = x[0].clone().reshape([batch, tokens, heads, size]);
        flat(rope(t, cos, sin))
    })
}

/// cos and sin of some angles for `tokens` positions, where x lives: `[N, E/2]` f32 each.
pub(super) fn angles(x: &Tensor<1>, tokens: usize, size: usize) -> (Tensor<2>, Tensor<2>) {
    let table = |of: fn(f64) -> f64| -> Tensor<2> {
        let angles = (0..tokens * size / 2).map(|i| of(0.37 * i as f64) as f32);
        let data = TensorData::new(angles.collect::<Vec<f32>>(), [tokens, size / 2]);
        Tensor::from_data(data, (&plain(x), DType::F32))
    };
    (table(f64::cos), table(f64::sin))
}

fn attention_case(
    name: &str,
    sizes: [usize; 5],
    window: Option<usize>,
    packing: Option<Packing>,
) -> Op {
    attention_behind(name, 0, sizes, window, packing)
}

/// The first `offset` of the tokens are keys only.
fn attention_behind(
    name: &str,
    offset: usize,
    [batch, tokens, heads, groups, size]: [usize; 5],
    window: Option<usize>,
    packing: Option<Packing>,
) -> Op {
    let place = match offset {
        0 => String::new(),
        _ => format!(" behind {offset}"),
    };
    let name = format!("attention {name}, {batch}×{tokens}{place}, heads {heads}/{groups}×{size}");
    let spec = AttentionSpec {
        window,
        scale: (size as f64).powf(-0.5),
        query_offset: offset,
        packing,
        context: None,
    };
    queries_and_keys(
        &name,
        tokens - offset,
        [batch, tokens, heads, groups, size],
        spec,
    )
}

/// Queries that stand behind all `tokens` keys, of which the first sees all and each next one less.
fn strip_case(queries: usize, sizes: [usize; 5]) -> Op {
    let [batch, tokens, heads, groups, size] = sizes;
    let place = format!("{batch}×{queries} behind all of {tokens}");
    let name = format!("attention {place}, heads {heads}/{groups}×{size}");
    let spec = AttentionSpec {
        window: Some(tokens + 1),
        scale: (size as f64).powf(-0.5),
        query_offset: tokens,
        packing: None,
        context: None,
    };
    queries_and_keys(&name, queries, sizes, spec)
}

fn queries_and_keys(
    name: &str,
    queries: usize,
    [batch, tokens, heads, groups, size]: [usize; 5],
    spec: AttentionSpec,
) -> Op {
    let (q, kv) = (
        batch * queries * heads * size,
        batch * tokens * groups * size,
    );
    op(name, &[(q, 1.0), (kv, 1.0), (kv, 1.0)], CHAIN, move |x| {
        let shaped = |i: usize, n: usize, h: usize| x[i].clone().reshape([batch, n, h, size]);
        flat(attention(
            shaped(0, queries, heads),
            shaped(1, tokens, groups),
            shaped(2, tokens, groups),
            spec.clone(),
        ))
    })
}

/// Where constants that go with `x` live.
fn plain(x: &Tensor<1>) -> Device {
    x.device().without_autodiff()
}

fn ints(ids: Vec<i64>, device: &Device) -> Tensor<1, Int> {
    let count = ids.len();
    Tensor::from_data(TensorData::new(ids, [count]), device)
}
