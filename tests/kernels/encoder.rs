//! What encoders do to rows and texts, against references in f64.

use half::bf16;
use neurond::kernel::gpu::{
    Activation, LayerNorm, Pooled, Ptr, Tables, TextItem, Token, add_layer_norm, attend_texts, bias_activate,
    embed_layer_norm, pool_rows, takes_texts,
};

use super::{BF16, Dice, at, in_any_order, near, on};

fn floats(dice: &mut Dice, count: usize, size: f32) -> Vec<f32> {
    (0..count).map(|_| dice.value() * size).collect()
}

/// `(x - mean) / sqrt(variance + eps) * weight + bias`
fn normed(x: &[f64], weight: &[f32], bias: &[f32], eps: f64) -> Vec<f64> {
    let mean = x.iter().sum::<f64>() / x.len() as f64;
    let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / x.len() as f64;
    let unit = x.iter().map(|x| (x - mean) / (variance + eps).sqrt());
    unit.zip(weight).zip(bias).map(|((x, &weight), &bias)| x * f64::from(weight) + f64::from(bias)).collect()
}

#[test]
fn rows_are_added_up_and_normed() {
    let mut dice = Dice(21);
    for (rows, width) in [(1, 8), (5, 384), (3, 1024), (2, 2056), (1, 8192), (0, 64)] {
        let (weight, bias) = (floats(&mut dice, width, 1.0), floats(&mut dice, width, 0.5));
        let eps = 1e-5;
        // x and y, one after the other.
        let check = |found: &[f32], expected: &dyn Fn(usize) -> Vec<f64>| {
            let (x, y) = found.split_at(rows * width);
            for row in 0..rows {
                let expected = normed(&expected(row), &weight, &bias, f64::from(eps));
                for (i, &expected) in expected.iter().enumerate() {
                    let at = row * width + i;
                    near(x[at], expected, 1e-4, 1e-5, &format!("{rows} x {width}: row {row}, {i}"));
                    assert_eq!(y[at], bf16::from_f32(x[at]).to_f32());
                }
            }
        };
        for segments in [0, 2] {
            let words = 20;
            let tables = [dice.bf16(words * width, 1.0), dice.bf16(9 * width, 1.0), dice.bf16(segments * width, 1.0)];
            let tokens: Vec<Token> = (0..rows)
                .map(|_| Token {
                    word: dice.below(words) as i32,
                    position: dice.below(9) as i32,
                    segment: dice.below(2) as i32,
                })
                .collect();
            let found = in_any_order(&vec![f32::MAX; 2 * rows * width], |on, both| {
                let (mut tokens, mut tables) = (tokens.clone(), tables.clone());
                let (mut weight, mut bias) = (weight.clone(), bias.clone());
                let (mut x, mut y) = (both[..rows * width].to_vec(), vec![bf16::NAN; rows * width]);
                let [words, positions, kinds] = &mut tables;
                let tables = Tables {
                    words: at(words),
                    positions: at(positions),
                    segments: if segments > 0 { at(kinds) } else { Ptr::null() },
                };
                let norm = LayerNorm { weight: at(&mut weight), bias: at(&mut bias), eps };
                embed_layer_norm(on, rows, width, at(&mut tokens), tables, norm, at(&mut x), at(&mut y)).unwrap();
                x.extend(y.iter().map(|y| y.to_f32()));
                *both = x;
            });
            check(&found, &|row| {
                let Token { word, position, segment } = tokens[row];
                let number = |table: &[bf16], row: i32, i: usize| f64::from(table[row as usize * width + i].to_f32());
                let segment = |i| if segments > 0 { number(&tables[2], segment, i) } else { 0.0 };
                (0..width).map(|i| number(&tables[0], word, i) + number(&tables[1], position, i) + segment(i)).collect()
            });
        }
        let (x, delta) = (floats(&mut dice, rows * width, 3.0), dice.bf16(rows * width, 1.0));
        let added = floats(&mut dice, width, 1.0);
        let found = in_any_order(&vec![f32::MAX; 2 * rows * width], |on, both| {
            let (mut x, mut delta, mut added) = (x.clone(), delta.clone(), added.clone());
            let (mut weight, mut bias) = (weight.clone(), bias.clone());
            let mut y = vec![bf16::NAN; rows * width];
            let norm = LayerNorm { weight: at(&mut weight), bias: at(&mut bias), eps };
            let delta = at(&mut delta);
            add_layer_norm(on, rows, width, at(&mut x), delta, at(&mut added), norm, at(&mut y)).unwrap();
            x.extend(y.iter().map(|y| y.to_f32()));
            *both = x;
        });
        check(&found, &|row| {
            let number = |i: usize| f64::from(x[row * width + i]) + f64::from(delta[row * width + i].to_f32());
            (0..width).map(|i| number(i) + f64::from(added[i])).collect()
        });
    }
    let norm = LayerNorm { weight: Ptr::null(), bias: Ptr::null(), eps: 0.0 };
    let refused = add_layer_norm(on(0), 1, 12, Ptr::null(), Ptr::null(), Ptr::null(), norm, Ptr::null());
    assert!(refused.unwrap_err().message().contains("multiples of 8"));
}

/// The error function by its series.
fn erf(x: f64) -> f64 {
    if x.abs() > 3.9 {
        return x.signum();
    }
    let (mut term, mut sum) = (x, 0.0);
    for n in 0..120 {
        sum += term / f64::from(2 * n + 1);
        term *= -x * x / f64::from(n + 1);
    }
    sum * 2.0 / std::f64::consts::PI.sqrt()
}

#[test]
fn biases_are_added_before_the_activation() {
    let mut dice = Dice(22);
    for (rows, width) in [(1, 8), (3, 1536), (2, 4096), (0, 32)] {
        let (mut x, bias) = (dice.bf16(rows * width, 6.0), floats(&mut dice, width, 1.0));
        if rows > 0 {
            // Both ends, where a formula can overflow.
            (x[0], x[1]) = (bf16::from_f32(-200.0), bf16::from_f32(200.0));
        }
        for act in [Activation::Gelu, Activation::GeluTanh, Activation::Relu, Activation::Tanh] {
            let found = in_any_order(&x, |on, x| {
                bias_activate(on, rows, width, at(x), at(&mut bias.clone()), act).unwrap();
            });
            for (i, found) in found.iter().enumerate() {
                let x = f64::from(x[i].to_f32()) + f64::from(bias[i % width]);
                let expected = match act {
                    Activation::Gelu => 0.5 * x * (1.0 + erf(x / 2f64.sqrt())),
                    Activation::GeluTanh => {
                        0.5 * x * (1.0 + (0.797_884_560_802_865_4 * (x + 0.044_715 * x.powi(3))).tanh())
                    }
                    Activation::Relu => x.max(0.0),
                    Activation::Tanh => x.tanh(),
                };
                near(found.to_f32(), expected, BF16, 1e-5, &format!("{act:?} of {x}"));
            }
        }
    }
}

/// Texts of these lengths, rows of NaN between them, against f64 with all three biases.
fn attends(dice: &mut Dice, heads: usize, dim: usize, lengths: &[usize]) {
    let width = heads * dim;
    let mut texts: Vec<(usize, usize)> = Vec::new();
    for &length in lengths {
        let row = texts.last().map_or(0, |(row, length)| row + length + 1);
        texts.push((row, length));
    }
    let rows = texts.last().map_or(0, |(row, length)| row + length + 1);
    let (mut qkv, bias) = (dice.bf16(rows * 3 * width, 1.5), floats(dice, 3 * width, 0.5));
    texts.iter().for_each(|(row, length)| qkv[(row + length) * 3 * width..][..3 * width].fill(bf16::NAN));
    let items: Vec<TextItem> = texts.iter().flat_map(|&(row, length)| TextItem::of(row, length)).collect();
    let untouched = bf16::from_f32(77.0);
    let found = in_any_order(&vec![untouched; rows * width], |on, out| {
        let (mut qkv, mut bias, mut items) = (qkv.clone(), bias.clone(), items.clone());
        let items = (at(&mut items), items.len());
        attend_texts(on, items, (heads, dim), at(&mut qkv), at(&mut bias), at(out)).unwrap();
    });
    for &(first, length) in &texts {
        let number = |row: usize, column: usize| {
            f64::from(qkv[(first + row) * 3 * width + column].to_f32()) + f64::from(bias[column])
        };
        for row in 0..length {
            for head in 0..heads {
                let score = |key: usize| {
                    let dot = |i: usize| number(row, head * dim + i) * number(key, width + head * dim + i);
                    (0..dim).map(dot).sum::<f64>() / (dim as f64).sqrt()
                };
                let scores: Vec<f64> = (0..length).map(score).collect();
                let most = scores.iter().copied().fold(f64::MIN, f64::max);
                let weights: Vec<f64> = scores.iter().map(|score| (score - most).exp()).collect();
                let total: f64 = weights.iter().sum();
                for i in 0..dim {
                    let part = |(key, weight): (usize, &f64)| weight * number(key, 2 * width + head * dim + i);
                    let expected = weights.iter().enumerate().map(part).sum::<f64>() / total;
                    let found = found[(first + row) * width + head * dim + i].to_f32();
                    // Weights are bf16 when they meet the values, and so are queries with their bias.
                    near(found, expected, 0.01, 0.005, &format!("row {row} of {length}, head {head} of {dim}, {i}"));
                }
            }
        }
        assert!(found[(first + length) * width..][..width].iter().all(|&x| x == untouched), "behind a text");
    }
}

#[test]
fn each_row_of_a_text_sees_all_of_it_and_nothing_else() {
    let mut dice = Dice(23);
    attends(&mut dice, 3, 32, &[1, 20, 64, 65, 16, 130]);
    attends(&mut dice, 2, 64, &[40, 1, 70, 129]);
    attends(&mut dice, 1, 128, &[3, 64, 100]);
    attends(&mut dice, 1, 32, &[300]);
    attends(&mut dice, 1, 64, &[]);
    assert!(takes_texts(12, 32).is_ok() && takes_texts(16, 64).is_ok());
    for (heads, dim) in [(4, 16), (12, 80), (64, 64)] {
        assert!(takes_texts(heads, dim).unwrap_err().message().contains(&format!("{heads} heads of {dim}")));
    }
}

#[test]
fn texts_become_vectors_of_length_one() {
    let mut dice = Dice(24);
    for width in [4, 100, 384, 3072] {
        let lengths = [1, 20, 7, 33, 3];
        let rows: usize = lengths.iter().sum();
        let mut x = floats(&mut dice, rows * width, 2.0);
        let mut row = 0;
        let mut texts = Vec::new();
        for (index, &length) in lengths.iter().enumerate() {
            texts.push(Pooled { row: row as i32, rows: length as i32, mean: index as i32 % 2 });
            row += length;
        }
        // A text of nothing at all has no direction.
        x[(rows - 3) * width..].fill(0.0);
        let found = in_any_order(&vec![f32::MAX; texts.len() * width], |on, out| {
            let (mut x, mut texts) = (x.clone(), texts.clone());
            let texts = (at(&mut texts), texts.len());
            pool_rows(on, texts, width, at(&mut x), at(out)).unwrap();
        });
        for (text, found) in texts.iter().zip(found.chunks(width)) {
            let rows = if text.mean == 1 { text.rows as usize } else { 1 };
            let number =
                |i: usize| (0..rows).map(|row| f64::from(x[(text.row as usize + row) * width + i])).sum::<f64>();
            let length = (0..width).map(|i| number(i).powi(2)).sum::<f64>().sqrt().max(1e-12);
            for (i, &found) in found.iter().enumerate() {
                near(found, number(i) / length, 1e-5, 1e-6, &format!("{text:?}, {i} of {width}"));
            }
        }
        // In other company the same, to the bit.
        let mut alone = vec![f32::MAX; width];
        pool_rows(on(0), (at(&mut texts[3..4].to_vec()), 1), width, at(&mut x), at(&mut alone)).unwrap();
        assert_eq!(alone, found[3 * width..][..width]);
    }
    let refused = pool_rows(on(0), (Ptr::null(), 0), 4096, Ptr::null(), Ptr::null()).unwrap_err();
    assert!(refused.message().contains("vectors of 4096"), "{refused}");
}
