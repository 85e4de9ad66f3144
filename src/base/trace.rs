//! Where a call stands in a trace that its caller keeps: W3C trace context, read from headers.

/// A trace, and the span in it that made the call.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TraceContext {
    /// The trace; never all zeros.
    pub trace: [u8; 16],
    /// The caller's span; `None`: the call is the first of its trace.
    pub parent: Option<[u8; 8]>,
    /// As in `traceparent`: the lowest bit says that the caller records its part.
    pub flags: u8,
}

impl TraceContext {
    /// The caller records what it does.
    pub const SAMPLED: u8 = 1;

    /// Reads a `traceparent` header: `00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01`. Of versions to come it reads what this
    /// one has.
    pub fn parse(text: &str) -> Option<Self> {
        // The standard knows lower case only, and readers that are more generous would join what others do not.
        if text.bytes().any(|letter| letter.is_ascii_uppercase()) {
            return None;
        }
        let mut parts = text.trim().splitn(5, '-');
        let [version] = bytes(parts.next()?)?;
        let (trace, parent) = (trace_id(parts.next()?)?, span_id(parts.next()?)?);
        let [flags] = bytes(parts.next()?)?;
        let is_known = version == 0 && parts.next().is_none();
        (is_known || (1..255).contains(&version)).then_some(Self { trace, parent: Some(parent), flags })
    }
}

/// Reads the id of a trace: 32 hex digits, not all of them 0.
pub fn trace_id(text: &str) -> Option<[u8; 16]> {
    bytes(text).filter(|id| id.iter().any(|byte| *byte != 0))
}

/// Reads the id of a span: 16 hex digits, not all of them 0.
pub fn span_id(text: &str) -> Option<[u8; 8]> {
    bytes(text).filter(|id| id.iter().any(|byte| *byte != 0))
}

fn bytes<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits = text.as_bytes();
    if digits.len() != 2 * N {
        return None;
    }
    let digit = |digit: u8| char::from(digit).to_digit(16);
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = (digit(pair[0])? << 4 | digit(pair[1])?) as u8;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
    const SPAN: &str = "00f067aa0ba902b7";

    #[test]
    fn a_traceparent_is_read_as_the_standard_has_it() {
        let check = |text: &str, flags: Option<u8>| {
            let expected = flags.map(|flags| TraceContext {
                trace: trace_id(TRACE).unwrap(),
                parent: Some(span_id(SPAN).unwrap()),
                flags,
            });
            assert_eq!(TraceContext::parse(text), expected, "{text:?}");
        };
        check(&format!("00-{TRACE}-{SPAN}-01"), Some(1));
        check(&format!("00-{TRACE}-{SPAN}-00"), Some(0));
        check(&format!(" 00-{TRACE}-{SPAN}-01 "), Some(1));
        check(&format!("cc-{TRACE}-{SPAN}-09-what-will-be"), Some(9));
        check(&format!("00-{TRACE}-{SPAN}-01-more"), None);
        check(&format!("ff-{TRACE}-{SPAN}-01"), None);
        check(&format!("00-{}-{SPAN}-01", TRACE.to_uppercase()), None);
        check(&format!("00-{}-{SPAN}-01", "0".repeat(32)), None);
        check(&format!("00-{TRACE}-{}-01", "0".repeat(16)), None);
        check(&format!("00-{TRACE}-{SPAN}"), None);
        check(&format!("00-{TRACE}-{SPAN}-1"), None);
        check(&format!("00-{}-{SPAN}-01", &TRACE[1..]), None);
        check("", None);
    }

    #[test]
    fn ids_are_hex_digits_of_their_length_and_not_nothing() {
        assert_eq!(span_id(SPAN), Some([0, 0xf0, 0x67, 0xaa, 0x0b, 0xa9, 0x02, 0xb7]));
        assert_eq!(span_id(&SPAN.to_uppercase()), span_id(SPAN));
        assert_eq!(trace_id(TRACE).map(|id| id[15]), Some(0x36));
        for wrong in
            ["", "0000000000000000", "00f067aa0ba902b", "00f067aa0ba902b70", "+0f067aa0ba902b7", "\u{e4}f067aa0ba902b7"]
        {
            assert_eq!(span_id(wrong), None, "{wrong:?}");
        }
        assert_eq!(trace_id(SPAN), None);
    }
}
