//! The bytes that a search begins at, as bits: sixty-four bytes of a text at a time.
//!
//! Prose has none of them in most of its blocks, so that it is passed over at the speed of one comparison of many bytes.

/// Bytes of a block.
pub(super) const BLOCK: usize = 64;

/// Of each byte of a block one bit, the first byte's the lowest.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(super) struct Marks {
    /// `0` to `9`.
    pub(super) digits: u64,
    /// `:` and `=`: a name may stand before.
    pub(super) signs: u64,
    /// `@`, and what may stand for it or for anything else: `%` and `\`.
    pub(super) ats: u64,
}

/// The marks of a text, block by block: where each begins, and its bits.
#[inline]
pub(super) fn marks(text: &[u8]) -> impl Iterator<Item = (usize, Marks)> {
    (0..text.len()).step_by(BLOCK).map(|begin| {
        let marks = match text[begin..].first_chunk() {
            Some(block) => of(block),
            None => {
                let mut block = [0; BLOCK];
                block[..text.len() - begin].copy_from_slice(&text[begin..]);
                of(&block)
            }
        };
        (begin, marks)
    })
}

/// Where the bits are that are set, from the lowest.
#[inline]
pub(super) fn ones(mut bits: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let at = bits.trailing_zeros();
        bits &= bits.wrapping_sub(1);
        (at < u64::BITS).then_some(at as usize)
    })
}

#[cfg(target_arch = "x86_64")]
#[inline]
fn of(block: &[u8; BLOCK]) -> Marks {
    // SAFETY: each of these processors has SSE2.
    unsafe { wide(block) }
}

#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "sse2")]
fn wide(block: &[u8; BLOCK]) -> Marks {
    use std::arch::x86_64::*;
    let mut marks = Marks::default();
    for (at, part) in block.as_chunks::<16>().0.iter().enumerate() {
        let number = u128::from_le_bytes(*part);
        let bytes = _mm_set_epi64x((number >> 64) as i64, number as i64);
        let is = |byte: u8| _mm_cmpeq_epi8(bytes, _mm_set1_epi8(byte as i8));
        let bits = |mask| u64::from(_mm_movemask_epi8(mask) as u16) << (16 * at);
        // The least of all signed bytes, once '0' is the first of them.
        let moved = _mm_add_epi8(bytes, _mm_set1_epi8(i8::MIN.wrapping_sub(b'0' as i8)));
        marks.digits |= bits(_mm_cmplt_epi8(moved, _mm_set1_epi8(i8::MIN + 10)));
        marks.signs |= bits(_mm_or_si128(is(b':'), is(b'=')));
        marks.ats |= bits(_mm_or_si128(_mm_or_si128(is(b'@'), is(b'%')), is(b'\\')));
    }
    marks
}

#[cfg(not(target_arch = "x86_64"))]
use plain as of;

/// The same for any processor.
#[cfg(any(test, not(target_arch = "x86_64")))]
#[inline]
fn plain(block: &[u8; BLOCK]) -> Marks {
    let bits = |is_meant: fn(u8) -> bool| {
        let parts = block.as_chunks::<8>().0.iter().enumerate();
        parts.fold(0, |bits, (at, part)| {
            let marked = u64::from_le_bytes(part.map(|byte| is_meant(byte).into()));
            // Gathers the lowest bits of eight bytes in the highest byte.
            bits | marked.wrapping_mul(0x0102_0408_1020_4080) >> 56 << (8 * at)
        })
    };
    Marks {
        digits: bits(|byte| byte.is_ascii_digit()),
        signs: bits(|byte| matches!(byte, b':' | b'=')),
        ats: bits(|byte| matches!(byte, b'@' | b'%' | b'\\')),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_is_marked_as_what_it_is_wherever_it_stands() {
        for byte in 0..=u8::MAX {
            for at in 0..BLOCK {
                let mut block = [b'x'; BLOCK];
                block[at] = byte;
                let bit = |is: bool| u64::from(is) << at;
                let wanted = Marks {
                    digits: bit(byte.is_ascii_digit()),
                    signs: bit(b":=".contains(&byte)),
                    ats: bit(b"@%\\".contains(&byte)),
                };
                assert_eq!((of(&block), plain(&block)), (wanted, wanted), "{byte} at {at}");
            }
        }
    }

    #[test]
    fn blocks_follow_each_other_and_the_last_may_be_short() {
        let text = [&[b'a'; BLOCK * 2 + 3][..], b"7=@"].concat();
        let found: Vec<_> = marks(&text).collect();
        let last = Marks { digits: 1 << 3, signs: 1 << 4, ats: 1 << 5 };
        assert_eq!(found, [(0, Marks::default()), (BLOCK, Marks::default()), (BLOCK * 2, last)]);
        assert_eq!(ones(1 | 1 << 5 | 1 << 63).collect::<Vec<_>>(), [0, 5, 63]);
        assert_eq!((marks(b"").count(), ones(0).count(), ones(u64::MAX).count()), (0, 0, 64));
    }
}
