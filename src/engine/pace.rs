//! How many rows of prompts a step may take while others wait for their next token.
//!
//! ```text
//! seconds of a step = fixed + decode * rows that decode + prompt * rows of prompts       learnt from measured steps
//!
//!   even  |=== decode ===|                      a step in which everybody decodes
//!   most  |=== decode ===|~~ prompt rows ~~|    even * stretch: what a step may take with prompts in it
//! ```
//!
//! A step lasts as long as all of its rows, and everybody in it waits for the slowest. So the pace of those who decode is
//! kept by bounding what prompts add, not by a number of rows, which would mean something else on every machine.
//! Pure: times come in as values.

use std::time::Duration;

/// Rows of a kernel's largest tile: a step whose rows are a multiple of it has no short tile at its end.
const TILE: usize = 8;
/// Rows that prompts have in any case, so that they always move on.
const LEAST_PROMPT: usize = 4;
/// How far one measured step moves the model towards itself.
const RATE: f64 = 0.2;
/// The fixed part of a step, in rows, as long as nothing is known of it; and its weight against rows in what is learnt.
const FIXED_ROWS: f64 = 8.0;
/// What a row adds to a step, in steps without rows, while nothing is known; and the least that is ever believed.
const GUESSED_ROW: f64 = 0.2;
const LEAST_ROW: f64 = 0.01;
/// How much more prompts may add when as many prompts are read or wait as answers are written: a crowd that arrives at
/// once would otherwise be let in one by one, each waiting for all before.
const CROWD: f64 = 8.0;

/// What steps cost on this device, learnt as they go by.
#[derive(Default)]
pub struct Pace {
    /// Seconds that any step takes, by [`FIXED_ROWS`].
    fixed: f64,
    /// Seconds a row that decodes adds.
    decode: f64,
    /// Seconds a row of a prompt adds.
    prompt: f64,
}

impl Pace {
    /// A step of so many rows took this long. Steps without prompts teach what those cost who decode, and what is left of
    /// others teaches what prompts cost: were it divided among all, a prompt whose rows become dearer as it grows would
    /// raise the very pace that it is measured by.
    pub fn learn(&mut self, decode: usize, prompt: usize, took: Duration) {
        let (decode_rows, prompt_rows, took) = (decode as f64, prompt as f64, took.as_secs_f64());
        if took <= 0.0 || decode + prompt == 0 {
            return;
        }
        if !self.is_known() {
            let unit = took / (FIXED_ROWS + decode_rows + prompt_rows);
            (self.fixed, self.decode, self.prompt) = (unit, unit, unit);
            return;
        }
        let expected = self.seconds(decode, prompt);
        // A step that the system interrupted says little about the next one.
        let lesson = RATE * (took - expected).clamp(-expected, expected);
        if prompt > 0 {
            self.prompt = (self.prompt + lesson / prompt_rows).max(0.0);
        } else {
            // Most along what the step had most of: steps of different sizes pin down both numbers.
            let pull = lesson / (FIXED_ROWS * FIXED_ROWS + decode_rows * decode_rows);
            self.fixed = (self.fixed + pull * FIXED_ROWS).max(0.0);
            self.decode = (self.decode + pull * decode_rows).max(0.0);
        }
    }

    fn is_known(&self) -> bool {
        self.fixed + self.decode + self.prompt > 0.0
    }

    /// What a step takes, as far as is known.
    pub fn seconds(&self, decode: usize, prompt: usize) -> f64 {
        self.fixed * FIXED_ROWS + self.decode * decode as f64 + self.prompt * prompt as f64
    }

    /// What a step takes, and what one more row that decodes adds to it. Not in seconds while nothing is known.
    pub fn step(&self, decode: usize, prompt: usize) -> (f32, f32) {
        let guess = Self { fixed: 1.0 / FIXED_ROWS, decode: GUESSED_ROW, prompt: GUESSED_ROW };
        let pace = if self.is_known() { self } else { &guess };
        // Nothing is free, whatever the clock says.
        let least = LEAST_ROW * pace.fixed * FIXED_ROWS;
        (pace.seconds(decode, prompt) as f32, pace.decode.max(least) as f32)
    }

    /// Prompt rows of a step with `decode` other rows, while `prompts` sequences read their prompts or wait to. At least
    /// [`LEAST_PROMPT`]; as many as you like while nothing is known.
    pub fn prompt_rows(&self, decode: usize, prompts: usize, stretch: f64) -> usize {
        if !self.is_known() {
            return usize::MAX;
        }
        let crowd = (prompts.saturating_sub(1) as f64 / decode.max(1) as f64).min(1.0);
        let most = self.seconds(decode + prompts, 0) * (1.0 + (stretch - 1.0) * (1.0 + CROWD * crowd));
        let rows = (most - self.seconds(decode, 0)) / self.prompt;
        if rows.is_nan() || rows >= (1 << 20) as f64 {
            return usize::MAX;
        }
        let rows = (rows.max(0.0) as usize).max(LEAST_PROMPT);
        let whole = ((decode + rows) / TILE * TILE).saturating_sub(decode);
        if whole > 0 { whole } else { rows }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A device whose steps take `fixed + decode * rows + prompt * rows` µs, now and then much longer.
    struct Device(f64, f64, f64);

    impl Device {
        fn seconds(&self, decode: usize, prompt: usize) -> f64 {
            (self.0 + self.1 * decode as f64 + self.2 * prompt as f64) * 1e-6
        }

        /// A pace that has seen prompts alone, answers alone, and both.
        fn known(&self) -> Pace {
            let mut pace = Pace::default();
            for step in 0..600 {
                let (decode, prompt) = [(0, 512), (16, 0), (4, 0), (16, 40), (8, 24), (1, 0)][step % 6];
                let hiccup = if step % 50 == 11 { 5.0 } else { 1.0 };
                pace.learn(decode, prompt, Duration::from_secs_f64(self.seconds(decode, prompt) * hiccup));
            }
            pace
        }
    }

    /// What `prompt_rows` allows makes a step of at most `stretch` times one in which all decode, and wastes little.
    fn check(device: &Device, decode: usize, stretch: f64) {
        let pace = device.known();
        let rows = pace.prompt_rows(decode, 1, stretch);
        let even = device.seconds(decode + 1, 0);
        let took = device.seconds(decode, rows);
        assert!(took <= even * stretch * 1.1 || rows == LEAST_PROMPT, "{decode} + {rows} rows take {took}, alone {even}");
        let more = device.seconds(decode, rows + 2 * TILE);
        assert!(more > even * stretch * 0.9, "{decode} + {rows} rows could be more: {more} of {}", even * stretch);
        assert!((decode + rows).is_multiple_of(TILE) || rows < TILE);
    }

    #[test]
    fn a_step_with_prompts_takes_at_most_so_many_times_one_without() {
        for device in [Device(4_000.0, 1_000.0, 540.0), Device(3_000.0, 20.0, 15.0), Device(100.0, 100.0, 100.0)] {
            for decode in [1, 4, 16, 64] {
                check(&device, decode, 1.7);
                check(&device, decode, 3.0);
            }
        }
    }

    #[test]
    fn prompts_always_move_on_and_nothing_is_bounded_before_anything_is_known() {
        assert_eq!(Pace::default().prompt_rows(16, 1, 1.5), usize::MAX);
        let dear = Device(10.0, 1.0, 10_000.0).known();
        assert_eq!(dear.prompt_rows(16, 1, 1.5), LEAST_PROMPT);
        let mut free = Pace::default();
        (0..100).for_each(|_| free.learn(16, 0, Duration::from_millis(1)));
        assert!(free.prompt_rows(16, 1, 2.0) >= TILE);
    }

    #[test]
    fn a_crowd_of_prompts_is_allowed_more_than_a_single_one() {
        let pace = Device(4_000.0, 1_000.0, 540.0).known();
        let rows: Vec<_> = [1, 4, 8].map(|prompts| pace.prompt_rows(8, prompts, 1.7)).into();
        assert!(rows[0] < rows[1] && rows[1] < rows[2], "{rows:?}");
        assert!(pace.seconds(8, rows[2]) < 8.0 * pace.seconds(16, 0));
    }

    #[test]
    fn one_more_row_costs_what_was_learnt_and_never_nothing() {
        assert_eq!(Pace::default().step(2, 0), (1.4, 0.2));
        let (step, row) = Device(4_000.0, 1_000.0, 540.0).known().step(4, 0);
        assert!((step - 0.008).abs() < 0.001 && (row - 0.001).abs() < 0.0002, "{step} {row}");
        let free = Pace { fixed: 1.0, decode: 0.0, prompt: 1.0 };
        assert_eq!(free.step(100, 0), (8.0, 0.08));
    }

    #[test]
    fn a_prompt_that_becomes_dearer_does_not_raise_the_pace_it_is_measured_by() {
        let mut pace = Device(4_000.0, 1_000.0, 540.0).known();
        let even = pace.seconds(17, 0);
        for step in 0..400 {
            let device = Device(4_000.0, 1_000.0, 540.0 + 5.0 * f64::from(step));
            let rows = pace.prompt_rows(16, 1, 1.5);
            let took = device.seconds(16, rows);
            assert!(took < 1.6 * even || rows <= LEAST_PROMPT, "step {step}: {rows} rows take {took}");
            pace.learn(16, rows, Duration::from_secs_f64(took));
        }
        assert_eq!(pace.seconds(17, 0), even);
    }

    #[test]
    fn the_model_follows_a_device_that_becomes_slower() {
        let mut pace = Device(4_000.0, 1_000.0, 540.0).known();
        let slower = Device(8_000.0, 2_000.0, 1_080.0);
        for step in 0..120 {
            let (decode, prompt) = [(16, 0), (16, 24), (0, 256)][step % 3];
            pace.learn(decode, prompt, Duration::from_secs_f64(slower.seconds(decode, prompt)));
        }
        let (says, is) = (pace.seconds(16, 24), slower.seconds(16, 24));
        assert!((says / is - 1.0).abs() < 0.1, "{says} for {is}");
    }
}
