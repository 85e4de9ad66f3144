//! How many rows of prompts a step may take while others wait for their next token.
//!
//! ```text
//! seconds of a step = fixed + decode rows + their context + prompt rows + their context      learnt from measured steps
//!
//!   even  |=== decode ===|                      a step in which everybody decodes
//!   most  |=== decode ===|~~ prompt rows ~~|    even * stretch: what a step may take with prompts in it
//! ```
//!
//! A step lasts as long as all of its rows, and everybody in it waits for the slowest. So the pace of those who decode is
//! kept by bounding what prompts add, not by a number of rows, which would mean something else on every machine. Context
//! counts by itself, since it makes the same rows dearer as a text grows: were it not known, a long prompt would seem to
//! make decoding dear, and raise the very pace that it is measured by. Pure: times come in as values.

use std::time::Duration;

/// Rows of a kernel's largest tile: a step whose rows are a multiple of it has no short tile at its end.
const TILE: usize = 8;
/// Rows that prompts have in any case, so that they always move on. One: late in a long text four rows look at so much that
/// they would make the step of sixteen answers twice as long by themselves, and a row of four costs little less than one alone.
const LEAST_PROMPT: usize = 1;
/// What a cost drifts by from one step to the next, as a part of itself; and what is not known of it at most.
const DRIFT: f64 = 0.01;
const UNKNOWN: f64 = 1.0;
/// What a step's time is off by for no reason, as a part of itself; and how much of a surprise is believed: where the system stops a
/// step now and then for as long as three take, nothing else would keep the model near what steps take when it does not.
const NOISE: f64 = 0.1;
const BELIEVED: f64 = 0.1;
/// After so many steps with answers and prompts comes one with answers alone: what those cost by themselves, which the pace is measured by,
/// could not be told from what prompts add otherwise, and would follow the host's slow moments.
const TOGETHER: u32 = 16;
/// The fixed part of a step, in rows, as long as nothing is known of it; and its weight against rows in what is learnt.
const FIXED_ROWS: f64 = 8.0;
/// Context that weighs as much as a row in what is learnt; and what it costs beside a row while nothing is known.
const CONTEXT: f64 = 256.0;
const GUESSED_CONTEXT: f64 = 0.25;
/// What [`Load::terms`] cost beside each other while nothing is known.
const GUESS: [f64; 5] = [1.0, 1.0, GUESSED_CONTEXT, 1.0, GUESSED_CONTEXT];
/// What a row adds to a step, in steps without rows, while nothing is known; and the least that is ever believed.
const GUESSED_ROW: f64 = 0.2;
const LEAST_ROW: f64 = 0.01;
/// How much more prompts may add when as many prompts are read or wait as answers are written, and until those are read: a
/// crowd that arrives at once would otherwise be let in one by one, each waiting for all before.
const CROWD: f64 = 20.0;

/// What a step computes.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Load {
    /// Rows of sequences that decode.
    pub decode: usize,
    /// Tokens that those attend to, over all rows.
    pub decode_context: usize,
    /// Rows of prompts.
    pub prompt: usize,
    /// Tokens that those attend to, over all rows.
    pub prompt_context: usize,
}

impl Load {
    /// `rows` more rows of sequences that decode, each after `context` tokens.
    pub fn decodes(&mut self, rows: usize, context: usize) {
        self.decode += rows;
        self.decode_context += rows * context;
    }

    /// `rows` more rows of a prompt of which `context` tokens are computed.
    pub fn reads(&mut self, rows: usize, context: usize) {
        self.prompt += rows;
        self.prompt_context += rows * (context + rows / 2);
    }

    fn terms(&self) -> [f64; 5] {
        let Self { decode, decode_context, prompt, prompt_context } = *self;
        [FIXED_ROWS, decode as f64, decode_context as f64 / CONTEXT, prompt as f64, prompt_context as f64 / CONTEXT]
    }
}

/// What steps cost on this device, learnt as they go by.
#[derive(Default)]
pub struct Pace {
    /// Seconds that each of [`Load::terms`] adds by one.
    costs: [f64; 5],
    /// How far they may be off, and together: a covariance.
    doubt: [[f64; 5]; 5],
    /// Steps in a row that had answers and prompts.
    together: u32,
}

impl Pace {
    /// A step took this long. A Kalman filter whose costs drift: a surprise is put down to what is least sure for as much as the step
    /// had of it. So a prompt that is read beside many answers, the cost of which is well known from steps without, does not change
    /// what those seem to cost, and a few of its rows are enough to know its own.
    pub fn learn(&mut self, load: Load, took: Duration) {
        match (load.decode, load.prompt) {
            (_, 0) => self.together = 0,
            (0, _) => {}
            _ => self.together = self.together.saturating_add(1),
        }
        let (terms, took) = (load.terms(), took.as_secs_f64());
        if took <= 0.0 || load.decode + load.prompt == 0 {
            return;
        }
        if !self.is_known() {
            let unit = took / dot(GUESS, terms);
            self.costs = GUESS.map(|guess| guess * unit);
            self.doubt = std::array::from_fn(|i| {
                std::array::from_fn(|j| if i == j { (UNKNOWN * self.costs[i]).powi(2) } else { 0.0 })
            });
            return;
        }
        // Costs of nothing would never be learnt again: what is dear or cheap on this device is told by the others.
        let unit = (self.costs[0] + self.costs[1] + self.costs[3]) / 3.0;
        for (i, guess) in GUESS.into_iter().enumerate() {
            let size = self.costs[i].max(unit * guess);
            self.doubt[i][i] += (DRIFT * size).powi(2);
            let excess = self.doubt[i][i] / (UNKNOWN * size).powi(2);
            if excess > 1.0 {
                let scale = excess.sqrt().recip();
                for j in 0..5 {
                    self.doubt[i][j] *= scale;
                    self.doubt[j][i] *= scale;
                }
            }
        }
        let expected = dot(self.costs, terms);
        let blame: [f64; 5] = self.doubt.map(|row| dot(row, terms));
        let spread = dot(blame, terms) + (NOISE * expected).powi(2);
        let surprise = (took - expected).clamp(-BELIEVED * expected, BELIEVED * expected);
        if spread <= 0.0 {
            return;
        }
        for (i, blame_i) in blame.into_iter().enumerate() {
            self.costs[i] = (self.costs[i] + blame_i / spread * surprise).max(0.0);
            for (doubt, blame_j) in self.doubt[i].iter_mut().zip(blame) {
                *doubt -= blame_i * blame_j / spread;
            }
        }
    }

    /// Whether any step was seen.
    pub fn is_known(&self) -> bool {
        self.costs.iter().any(|&cost| cost > 0.0)
    }

    /// What a step takes, as far as is known.
    pub fn seconds(&self, load: Load) -> f64 {
        dot(self.costs, load.terms())
    }

    /// What a step takes, and what one more row that decodes adds to it. Not in seconds while nothing is known.
    pub fn step(&self, load: Load) -> (f32, f32) {
        let guess = Self { costs: [1.0 / FIXED_ROWS, GUESSED_ROW, 0.0, GUESSED_ROW, 0.0], ..Self::default() };
        let pace = if self.is_known() { self } else { &guess };
        // Nothing is free, whatever the clock says.
        let least = LEAST_ROW * pace.costs[0] * FIXED_ROWS;
        (pace.seconds(load) as f32, pace.costs[1].max(least) as f32)
    }

    /// Prompt rows of a step that decodes `load`, while `prompts` sequences read their prompts or wait to, the first of
    /// them after `context` tokens, as part of a `crowd` or not. One at least, so that prompts move on, but for a step now and then
    /// that is to show what answers cost alone; as many as you like while nothing is known.
    pub fn prompt_rows(&self, load: Load, prompts: usize, crowd: bool, context: usize, stretch: f64) -> usize {
        if !self.is_known() {
            return usize::MAX;
        }
        if self.together >= TOGETHER {
            return 0;
        }
        let decode = load.decode;
        let crowd = if crowd { 1.0 } else { (prompts.saturating_sub(1) as f64 / decode.max(1) as f64).min(1.0) };
        let mut all = load;
        all.decodes(prompts, load.decode_context / decode.max(1));
        let most = self.seconds(all) * (1.0 + (stretch - 1.0) * (1.0 + CROWD * crowd));
        // What is left = rows * first + rows^2 * more, since each row attends to those before it.
        let (left, [.., row, attended]) = (most - self.seconds(load), self.costs);
        let (first, more) = (row + attended * context as f64 / CONTEXT, attended / (2.0 * CONTEXT));
        let rows = 2.0 * left / (first + (first * first + 4.0 * more * left.max(0.0)).sqrt());
        if rows.is_nan() || rows >= (1 << 20) as f64 {
            return usize::MAX;
        }
        let rows = (rows.max(0.0) as usize).max(LEAST_PROMPT);
        let whole = ((decode + rows) / TILE * TILE).saturating_sub(decode);
        if whole > 0 { whole } else { rows }
    }
}

/// Not one sum after the other: simulations spend their time here.
fn dot(a: [f64; 5], b: [f64; 5]) -> f64 {
    (a[0] * b[0] + a[1] * b[1]) + (a[2] * b[2] + a[3] * b[3]) + a[4] * b[4]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A device: microseconds of a step, of a row that decodes, of a row of a prompt, and of 256 tokens of context.
    #[derive(Clone, Copy)]
    struct Device(f64, f64, f64, f64);

    const CPU: Device = Device(4_000.0, 700.0, 540.0, 130.0);

    fn decode(rows: usize, context: usize) -> Load {
        Load { decode: rows, decode_context: rows * context, ..Load::default() }
    }

    fn with(mut load: Load, rows: usize, context: usize) -> Load {
        load.reads(rows, context);
        load
    }

    impl Device {
        fn seconds(&self, load: Load) -> f64 {
            let context = (load.decode_context + load.prompt_context) as f64 / 256.0;
            (self.0 + self.1 * load.decode as f64 + self.2 * load.prompt as f64 + self.3 * context) * 1e-6
        }

        /// A pace that has seen prompts alone, answers alone, and both.
        fn known(&self) -> Pace {
            let mut pace = Pace::default();
            for step in 0..600 {
                let load = match step % 6 {
                    0 => with(Load::default(), 512, 0),
                    1 => decode(16, 300),
                    2 => decode(4, 100),
                    3 => with(decode(16, 200), 40, 500),
                    4 => with(decode(8, 400), 24, 100),
                    _ => decode(1, 50),
                };
                let hiccup = if step % 50 == 11 { 5.0 } else { 1.0 };
                pace.learn(load, Duration::from_secs_f64(self.seconds(load) * hiccup));
            }
            pace
        }
    }

    /// What `prompt_rows` allows makes a step of at most `stretch` times one in which all decode, and wastes little.
    fn check(device: &Device, rows: usize, stretch: f64) {
        let (pace, load) = (device.known(), decode(rows, 200));
        let read = pace.prompt_rows(load, 1, false, 100, stretch);
        let even = device.seconds(decode(rows + 1, 200));
        let took = device.seconds(with(load, read, 100));
        assert!(
            took <= even * stretch * 1.15 || read == LEAST_PROMPT,
            "{rows} + {read} rows take {took}, alone {even}"
        );
        let more = device.seconds(with(load, read + 2 * TILE, 100));
        assert!(more > even * stretch * 0.85, "{rows} + {read} rows could be more: {more} of {}", even * stretch);
        assert!((rows + read).is_multiple_of(TILE) || read < TILE);
    }

    #[test]
    fn a_step_with_prompts_takes_at_most_so_many_times_one_without() {
        for device in [CPU, Device(3_000.0, 20.0, 15.0, 1.0), Device(100.0, 100.0, 100.0, 10.0)] {
            for rows in [1, 4, 16, 64] {
                check(&device, rows, 1.7);
                check(&device, rows, 3.0);
            }
        }
    }

    #[test]
    fn prompts_always_move_on_and_nothing_is_bounded_before_anything_is_known() {
        assert_eq!(Pace::default().prompt_rows(decode(16, 10), 1, false, 0, 1.5), usize::MAX);
        let dear = Device(10.0, 1.0, 10_000.0, 0.0).known();
        assert_eq!(dear.prompt_rows(decode(16, 10), 1, false, 0, 1.5), LEAST_PROMPT);
        let mut free = Pace::default();
        (0..100).for_each(|_| free.learn(decode(16, 10), Duration::from_millis(1)));
        assert!(free.prompt_rows(decode(16, 10), 1, false, 0, 2.0) >= TILE);
    }

    #[test]
    fn a_crowd_of_prompts_is_allowed_more_than_a_single_one() {
        let pace = CPU.known();
        let rows: Vec<_> = [1, 4, 8].map(|prompts| pace.prompt_rows(decode(8, 100), prompts, false, 0, 1.3)).into();
        assert!(rows[0] < rows[1] && rows[1] < rows[2], "{rows:?}");
        assert!(pace.seconds(with(decode(8, 100), rows[2], 0)) < 8.0 * pace.seconds(decode(16, 100)));
        // Its last prompts as much as its first.
        assert!(pace.prompt_rows(decode(15, 100), 1, true, 0, 1.3) > rows[1]);
    }

    #[test]
    fn a_prompt_that_becomes_dearer_does_not_raise_the_pace_it_is_measured_by() {
        let mut pace = CPU.known();
        let (mut read, mut own, mut alone) = (0, 200, 0);
        while read < 4_000 {
            let load = decode(16, own);
            let rows = pace.prompt_rows(load, 1, false, read, 1.5);
            let took = CPU.seconds(with(load, rows, read));
            let even = CPU.seconds(decode(17, own));
            assert!(took < 1.7 * even || rows <= LEAST_PROMPT, "after {read}: {rows} rows take {took} beside {even}");
            assert!(took > 1.2 * even || rows == 0, "after {read}: {rows} rows take {took} beside {even}");
            alone = if rows == 0 { 0 } else { alone + 1 };
            assert!(alone <= TOGETHER, "what answers cost alone is not looked at any more");
            pace.learn(with(load, rows, read), Duration::from_secs_f64(took));
            (read, own) = (read + rows, own + 1);
        }
        let says = pace.seconds(decode(16, own)) / CPU.seconds(decode(16, own));
        assert!((0.85..1.15).contains(&says), "{says}");
    }

    /// Where the host stops a step now and then, a prompt beside many answers is read as fast as where it does not.
    #[test]
    fn steps_that_take_long_for_no_reason_do_not_make_prompts_wait() {
        for stopped in [0, 10, 34] {
            let (mut pace, mut dice, mut slowest) = (CPU.known(), 12_345u64, 0f64);
            let (mut read, mut steps) = (0, 0);
            while read < 4_000 {
                let load = decode(16, 200 + steps);
                let rows = pace.prompt_rows(load, 1, false, read, 1.3);
                let load = with(load, rows, read);
                slowest = slowest.max(CPU.seconds(load) / CPU.seconds(decode(17, 200 + steps)));
                dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let times = if (dice >> 40) % 100 < stopped { 3.0 } else { 1.0 };
                pace.learn(load, Duration::from_secs_f64(CPU.seconds(load) * times));
                (read, steps) = (read + rows, steps + 1);
            }
            assert!(
                steps < 1_100 && slowest < 1.4,
                "{stopped}: {steps} steps, the slowest {slowest} times one without"
            );
        }
    }

    /// Where the host is slow for some dozens of steps now and then, what answers cost alone is not lost sight of.
    #[test]
    fn the_pace_is_kept_through_slow_moments() {
        for seed in [7u64, 99, 4_321] {
            let (mut pace, mut dice, mut slow) = (CPU.known(), seed, 0u32);
            let (mut read, mut steps, mut stretches) = (0, 0, Vec::new());
            while read < 4_000 {
                let load = decode(16, 200 + steps);
                let rows = pace.prompt_rows(load, 1, false, read, 1.3);
                let load = with(load, rows, read);
                stretches.push(CPU.seconds(load) / CPU.seconds(decode(17, 200 + steps)));
                dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                slow = match slow {
                    0 if (dice >> 40).is_multiple_of(100) => 60,
                    slow => slow.saturating_sub(1),
                };
                pace.learn(load, Duration::from_secs_f64(CPU.seconds(load) * if slow > 0 { 1.6 } else { 1.0 }));
                (read, steps) = (read + rows, steps + 1);
            }
            stretches.sort_by(f64::total_cmp);
            let at = |part: usize| stretches[stretches.len() * part / 100];
            assert!((1.15..1.3).contains(&at(50)) && at(99) < 1.4, "{seed}: p50 {}, p99 {}", at(50), at(99));
        }
    }

    #[test]
    fn one_more_row_costs_what_was_learnt_and_never_nothing() {
        assert_eq!(Pace::default().step(decode(2, 100)), (1.4, 0.2));
        let (step, row) = CPU.known().step(decode(4, 100));
        assert!((step - 0.007).abs() < 0.001 && (row - 0.0007).abs() < 0.0003, "{step} {row}");
        let free = Pace { costs: [1.0, 0.0, 0.0, 1.0, 0.0], ..Pace::default() };
        assert_eq!(free.step(decode(100, 100)), (8.0, 0.08));
    }

    #[test]
    fn the_model_follows_a_device_that_becomes_slower() {
        let mut pace = CPU.known();
        let slower = Device(8_000.0, 1_400.0, 1_080.0, 260.0);
        for step in 0..120 {
            let load = [decode(16, 200), with(decode(16, 200), 24, 100), with(Load::default(), 256, 0)][step % 3];
            pace.learn(load, Duration::from_secs_f64(slower.seconds(load)));
        }
        let load = with(decode(16, 200), 24, 100);
        let (says, is) = (pace.seconds(load), slower.seconds(load));
        assert!((says / is - 1.0).abs() < 0.1, "{says} for {is}");
    }
}
