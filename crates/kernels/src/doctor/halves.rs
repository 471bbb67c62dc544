//! The halves of a block as one operation, against the same maths composed of single ones.
//!
//! Where the GPU would not take the fused form, the result is not a number and the comparison fails.

use burn::tensor::{DType, Tensor};

use super::cases::{CHAIN, flat, op, packed, scan_case};
use super::compare::Op;
use crate::dtype::cast;
use crate::fused::{GateWeights, gated, mlp_sublayer, ttt_sublayer};
use crate::ttt::{ScanSpec, fast_weight_scan};
use crate::{Packing, linear, rms_norm, swiglu};

mod attention;

use attention::Half;

const EPS: f64 = 1e-6;

/// All cases.
pub fn all() -> Vec<Op> {
    let causal = Half {
        batch: 2,
        tokens: 200,
        width: 96,
        heads: 4,
        groups: 2,
        size: 64,
        window: None,
        packing: None,
        qk_norm: false,
        joined: false,
        shared: false,
    };
    let packing = packed(2, 200);
    let aligned = Packing::new(1024, vec![vec![0, 256], vec![0]]);
    let aligned = aligned.unwrap_or_else(|_| Packing::whole_rows(2, 1024));
    // The first 79 queries of tokens 200 to 400, and the strip of as many before them.
    let at_the_edge = |name: &str, starts: [Vec<usize>; 2]| {
        let part = Half {
            window: Some(80),
            qk_norm: true,
            packing: Packing::new(600, starts.to_vec()).ok(),
            shared: true,
            ..causal.clone()
        };
        part.attention(&format!("{name}, a part of rows"))
    };
    vec![
        causal.clone().attention("causal"),
        Half {
            joined: true,
            ..causal.clone()
        }
        .attention("one matrix"),
        // On Hopper queries, keys and values are rotated within their product: rows that end within a tile, a
        // key beside a value in a tile, less depth than a tile has parts; more tiles than a GPU has blocks.
        Half {
            joined: true,
            tokens: 208,
            width: 192,
            heads: 2,
            groups: 1,
            size: 128,
            ..causal.clone()
        }
        .attention("one matrix"),
        Half {
            joined: true,
            batch: 3,
            tokens: 1008,
            width: 512,
            heads: 8,
            size: 128,
            window: Some(48),
            ..causal.clone()
        }
        .attention("one matrix, window 48"),
        Half {
            window: Some(48),
            groups: 4,
            joined: true,
            ..causal.clone()
        }
        .attention("window 48"),
        Half {
            size: 128,
            heads: 2,
            width: 1024,
            packing: Some(packing.clone()),
            ..causal.clone()
        }
        .attention("documents"),
        Half {
            qk_norm: true,
            ..causal.clone()
        }
        .attention("normed heads"),
        // Two warps to a row, the second with an odd number of steps.
        Half {
            qk_norm: true,
            heads: 18,
            groups: 6,
            size: 128,
            ..causal.clone()
        }
        .attention("normed heads, 30 to a row"),
        Half {
            qk_norm: true,
            packing: Some(packing),
            window: Some(30),
            size: 128,
            ..causal.clone()
        }
        .attention("normed heads, documents, window"),
        Half {
            window: Some(80),
            joined: true,
            shared: true,
            ..causal.clone()
        }
        .attention("a part of rows"),
        Half {
            window: Some(80),
            qk_norm: true,
            shared: true,
            ..causal.clone()
        }
        .attention("normed heads, a part of rows"),
        // Documents, so that queries, keys and values lie apart.
        Half {
            window: Some(80),
            packing: Some(packed(2, 600)),
            shared: true,
            ..causal.clone()
        }
        .attention("documents, a part of rows"),
        Half {
            window: Some(80),
            groups: 4,
            joined: true,
            qk_norm: true,
            packing: Some(packed(2, 600)),
            shared: true,
            ..causal.clone()
        }
        .attention("normed heads, documents, a part of rows"),
        at_the_edge(
            "a document ends among first queries",
            [vec![0, 100, 240], vec![0]],
        ),
        at_the_edge("a document begins at the edge", [vec![0, 200], vec![0]]),
        at_the_edge("a document begins in the strip", [vec![0, 150], vec![0]]),
        mlp(2, 101, 96, 264, false),
        mlp(1, 130, 1024, 128, true),
        mlp(3, 333, 192, 384, false),
        // On Hopper one product makes gate, up and Z: the last rows fill no tile; the first has more tiles
        // than a GPU has blocks.
        also_untracked(mlp(3, 1000, 512, 1024, true)),
        also_untracked(mlp(1, 1000, 1024, 384, false)),
        gate(2, 101, 96, 264),
        also_untracked(gate(1, 1000, 512, 384)),
        learning(
            "rows in one group",
            Packing::whole_rows(3, 64),
            16,
            [96, 136],
        ),
        learning("odd rows", Packing::whole_rows(2, 101), 16, [96, 136]),
        learning("documents", packed(2, 200), 16, [96, 136]),
        learning("long documents", packed(2, 700), 8, [96, 136]),
        // Whole tiles: back through SwiGLU within the product.
        learning("tiles", Packing::whole_rows(2, 768), 256, [192, 256]),
        learning("tiles, documents", aligned, 256, [64, 384]),
        learning("tiles or not", packed(2, 1280), 256, [64, 128]),
        learning(
            "tiles, several groups",
            Packing::whole_rows(1, 9216),
            256,
            [64, 128],
        ),
    ]
}

/// Cases for which the last piece of each document is to be left out of products: alone, every so many
/// pieces, here and there, and where there are none but last ones.
pub fn left_out() -> Vec<Op> {
    let uneven = vec![vec![0, 48, 64, 160], vec![0], vec![0, 16, 32, 200]];
    let uneven = Packing::new(256, uneven).unwrap_or_else(|_| Packing::whole_rows(3, 256));
    let single = Packing::new(64, vec![vec![0, 16, 32, 48]]);
    let single = single.unwrap_or_else(|_| Packing::whole_rows(1, 64));
    let tiles = Packing::new(2048, vec![vec![0, 512, 768, 1536]]);
    let tiles = tiles.unwrap_or_else(|_| Packing::whole_rows(1, 2048));
    let running = Packing::new(3072, vec![vec![0, 1536, 2048]]);
    let running = running.unwrap_or_else(|_| Packing::whole_rows(1, 3072));
    let equal = |rows, length| Packing::whole_rows(rows, length);
    let cases = [
        ("a document", equal(1, 128), 16, [96, 136]),
        ("equal documents", equal(8, 64), 16, [96, 136]),
        // Weights that are not kept.
        ("two groups of them", equal(16, 64), 16, [96, 136]),
        ("unequal documents", uneven.clone(), 16, [96, 136]),
        ("one piece each", single, 16, [96, 136]),
        ("a long document", equal(2, 640), 16, [96, 136]),
        ("tiles, equal documents", equal(4, 768), 256, [128, 256]),
        ("tiles, unequal documents", tiles, 256, [64, 384]),
        // On Hopper, running sums within the products: the last tiles of a row are not whole. Documents of a
        // piece and of several; one in two groups.
        ("running sums", running, 512, [256, 320]),
        ("running sums, two groups", equal(1, 13056), 384, [256, 192]),
    ];
    let learn = |(name, packing, chunk, widths)| {
        let name = format!("pieces left out, {name}");
        spoiling(learning(&name, packing, chunk, widths))
    };
    let mut all: Vec<Op> = cases.into_iter().map(learn).collect();
    for (name, packing) in [("equal documents", equal(8, 64)), ("unequal", uneven)] {
        let name = format!("pieces left out, {name}");
        all.push(spoiling(scan_case(&name, &packing, 16)));
    }
    all
}

/// The operation in memory that held numbers that are none: what it does not write must not be read.
fn spoiling(case: Op) -> Op {
    let run = case.run;
    let spoilt = move |x: &[Tensor<1>]| {
        if x[0].dtype() == DType::BF16 {
            let device = x[0].device().without_autodiff();
            // Freed at the end of the block, and found again by whoever needs as much or less.
            let sizes = (14..23).map(|power| 1 << power);
            let _held: Vec<Tensor<1>> = sizes
                .flat_map(|size: usize| [size; 4])
                .map(|size| Tensor::full([size], f32::NAN, (&device, DType::BF16)))
                .collect();
        }
        run(x)
    };
    Op {
        run: Box::new(spoilt),
        ..case
    }
}

/// What the operations composed give; on a GPU, where it stands for a fused form that was not taken,
/// not a number.
fn composed(y: Tensor<1>) -> Tensor<1> {
    match y.dtype() {
        DType::BF16 => y * f32::NAN,
        _ => y,
    }
}

/// The operation, and behind its result that of the same where nothing is tracked.
fn also_untracked(op: Op) -> Op {
    let run = op.run;
    let both = move |x: &[Tensor<1>]| {
        let y = run(x);
        let untracked = |t: &Tensor<1>| match t.is_tracked() {
            true => t.clone().inner(),
            false => t.clone(),
        };
        let again = run(&x.iter().map(untracked).collect::<Vec<_>>());
        let again = match y.is_tracked() {
            true => again.autodiff(),
            false => again,
        };
        Tensor::cat(vec![y, again], 0)
    };
    Op {
        name: format!("{}, also untracked", op.name),
        run: Box::new(both),
        ..op
    }
}

/// What makes Z.
struct Gate {
    norm: Tensor<1>,
    gate: Tensor<2>,
    up: Tensor<2>,
}

impl Gate {
    /// Of the norm's gain `[D]` and two matrices `[F, D]`, end to end.
    fn new(norm: &Tensor<1>, matrices: [Tensor<1>; 2]) -> Self {
        let width = norm.dims()[0];
        let [gate, up] = matrices.map(|flat| {
            let inner = flat.dims()[0] / width;
            flat.reshape([inner, width])
        });
        let norm = norm.clone();
        Self { norm, gate, up }
    }

    fn weights(&self) -> GateWeights<'_> {
        GateWeights {
            norm: &self.norm,
            gate: &self.gate,
            up: &self.up,
            eps: EPS,
        }
    }

    /// Z of single operations: x `[B, N, D]` → `[B, N, F]`.
    fn z(&self, x: &Tensor<3>) -> Tensor<3> {
        let normed = rms_norm(x.clone(), self.norm.clone(), EPS);
        let gate = linear(normed.clone(), self.gate.clone());
        swiglu(gate, linear(normed, self.up.clone()))
    }
}

fn mlp(batch: usize, tokens: usize, width: usize, inner: usize, joined: bool) -> Op {
    let name = format!("MLP half, {batch}×{tokens}×{width}, {inner}");
    let scale = (width as f64).powf(-0.5);
    let mut inputs = vec![
        (batch * tokens * width, 1.0),
        (width, 1.0),
        (width * inner, (inner as f64).powf(-0.5)),
    ];
    match joined {
        true => inputs.push((2 * inner * width, scale)),
        false => inputs.extend([(inner * width, scale); 2]),
    }
    op(&name, &inputs, CHAIN, move |x| {
        let down: Tensor<2> = x[2].clone().reshape([width, inner]);
        let matrix = |i: usize| match joined {
            true => x[3].clone().narrow(0, i * inner * width, inner * width),
            false => x[3 + i].clone(),
        };
        let gate = Gate::new(&x[1], [0, 1].map(matrix));
        let t: Tensor<3> = x[0].clone().reshape([batch, tokens, width]);
        if let Some(y) = mlp_sublayer(&t, &gate.weights(), &down) {
            return flat(y);
        }
        let z = gate.z(&t);
        composed(flat(t + linear(z, down)))
    })
}

/// The half of a layer that learns.
fn learning(name: &str, packing: Packing, chunk: usize, [width, inner]: [usize; 2]) -> Op {
    let (batch, tokens) = (packing.rows().len(), packing.length());
    let name = format!("TTT half, {name}, {batch}×{tokens}×{width}, {inner}, chunk {chunk}");
    let scale = (width as f64).powf(-0.5);
    let inputs = [
        (batch * tokens * width, 1.0),
        (width, 1.0),
        (inner * width, scale),
        (inner * width, scale),
        (batch * tokens * width, 0.1),
        (width * inner, 0.3),
    ];
    op(&name, &inputs, CHAIN, move |x| {
        let gate = Gate::new(&x[1], [x[2].clone(), x[3].clone()]);
        let rows = |i: usize| -> Tensor<3> { x[i].clone().reshape([batch, tokens, width]) };
        let (t, v) = (rows(0), rows(4));
        // As in training: W0 in f32.
        let w0 = cast(x[5].clone(), DType::F32).reshape([width, inner]);
        let spec = ScanSpec {
            lr: 0.3,
            chunk,
            clip: None,
            packing: packing.clone(),
            context: None,
        };
        if let Some(scan) = ttt_sublayer(&t, &gate.weights(), || v.clone(), &w0, &spec) {
            return flat(scan.output);
        }
        let z = gate.z(&t);
        composed(flat(t + fast_weight_scan(z, v, w0, spec).output))
    })
}

fn gate(batch: usize, tokens: usize, width: usize, inner: usize) -> Op {
    let name = format!("gate and up, {batch}×{tokens}×{width}, {inner}");
    let scale = (width as f64).powf(-0.5);
    let inputs = [
        (batch * tokens * width, 1.0),
        (width, 1.0),
        (inner * width, scale),
        (inner * width, scale),
    ];
    op(&name, &inputs, CHAIN, move |x| {
        let gate = Gate::new(&x[1], [x[2].clone(), x[3].clone()]);
        let t: Tensor<3> = x[0].clone().reshape([batch, tokens, width]);
        if let Some(z) = gated(&t, &gate.weights()) {
            return flat(z);
        }
        composed(flat(gate.z(&t)))
    })
}
