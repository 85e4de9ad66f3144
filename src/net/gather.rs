//! A body of many chunks as one piece. Most come in one already, which is handed on as it is.

use bytes::Bytes;

/// See the top of this file.
#[derive(Default)]
pub struct Gather {
    first: Bytes,
    /// The first and all others, once there are others.
    all: Vec<u8>,
    expected: usize,
}

impl Gather {
    /// Of a body that is said to have so many bytes.
    pub fn expecting(bytes: usize) -> Self {
        Self { expected: bytes, ..Self::default() }
    }

    /// Takes the next chunk. `false`: with it there would be more than `limit` bytes, and it is not taken.
    #[must_use]
    pub fn push(&mut self, chunk: Bytes, limit: usize) -> bool {
        if self.first.len() + self.all.len() + chunk.len() > limit {
            return false;
        }
        if self.first.is_empty() && self.all.is_empty() {
            self.first = chunk;
            return true;
        }
        if self.all.is_empty() {
            let first = std::mem::take(&mut self.first);
            self.all.reserve(self.expected.max(first.len() + chunk.len()));
            self.all.extend_from_slice(&first);
        }
        self.all.extend_from_slice(&chunk);
        true
    }

    /// All of them.
    pub fn whole(self) -> Bytes {
        if self.all.is_empty() { self.first } else { self.all.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_become_one_piece_up_to_a_limit_and_one_chunk_stays_as_it_is() {
        let check = |chunks: &[&'static str], limit: usize, expected: Option<&str>| {
            let mut gather = Gather::expecting(4);
            let fits = chunks.iter().all(|chunk| gather.push(Bytes::from_static(chunk.as_bytes()), limit));
            let whole = gather.whole();
            assert_eq!(fits.then_some(&whole[..]), expected.map(str::as_bytes), "{chunks:?} {limit}");
        };
        check(&[], 0, Some(""));
        check(&["ab"], 2, Some("ab"));
        check(&["ab"], 1, None);
        check(&["", "ab", "", "cd", "e"], 5, Some("abcde"));
        check(&["ab", "cd", "e"], 4, None);
        let chunk = Bytes::from_static(b"one");
        let mut gather = Gather::default();
        assert!(gather.push(chunk.clone(), 3));
        assert_eq!(gather.whole().as_ptr(), chunk.as_ptr());
    }
}
