//! A notice as Slack's incoming webhooks take it, and others that are shaped like them.
//!
//! ```text
//!   { text: one line, for notifications,   blocks: [ title, facts side by side, what to look at next, who says so ] }
//! ```

use bytes::Bytes;
use serde_json::{Value, json};

use super::failure::cut;
use super::notice::{Event, Notice};
use super::settings::Severity;

/// Letters of a fact; Slack takes 2,000, and an escaped letter counts as up to five.
const MAX_FACT: usize = 380;
/// Letters of a paragraph; Slack takes 3,000.
const MAX_PARAGRAPH: usize = 580;

/// The document.
pub(super) fn body(notice: &Notice, instance: &str) -> Bytes {
    let title = format!("{} {}", sign(notice), escape(cut(&notice.title(), MAX_PARAGRAPH)));
    let section = |text: String| json!({"type": "section", "text": mrkdwn(text)});
    let facts = notice.facts();
    let facts = facts.iter().map(|(name, fact)| mrkdwn(format!("*{name}*\n{}", escape(cut(fact, MAX_FACT)))));
    let facts = json!({"type": "section", "fields": facts.collect::<Vec<_>>()});
    let mut blocks = vec![section(format!("*{title}*")), facts];
    if notice.event != Event::Resolved {
        let next = escape(cut(&notice.next, MAX_PARAGRAPH));
        blocks.push(section(format!("*What to look at next*\n{next}")));
    }
    let said = format!("{instance}, rule \"{}\", notice {}", notice.rule, notice.id);
    blocks.push(json!({"type": "context", "elements": [mrkdwn(escape(cut(&said, MAX_FACT)))]}));
    Bytes::from(json!({"text": title, "blocks": blocks}).to_string())
}

/// So that one that is over is told from one that is not at a glance.
fn sign(notice: &Notice) -> &'static str {
    match (notice.event, notice.severity) {
        (Event::Resolved, _) => ":white_check_mark:",
        (Event::Test, _) => ":wave:",
        (_, Severity::Critical) => ":rotating_light:",
        (_, Severity::Warning) => ":warning:",
        (_, Severity::Info) => ":information_source:",
    }
}

fn mrkdwn(text: String) -> Value {
    json!({"type": "mrkdwn", "text": text})
}

/// The three letters that mean something to Slack: a name must not become a link or call everybody.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::Millis;

    fn document(notice: &Notice) -> Value {
        serde_json::from_slice(&body(notice, "neurond on gpu-1")).unwrap()
    }

    fn notice(event: Event) -> Notice {
        let test = Notice::test(Millis(1_750_000_000_000));
        Notice { event, value: Some(90.0), of: Some("device <!channel> & 0".into()), next: "Look.".into(), ..test }
    }

    #[test]
    fn a_message_has_a_line_for_notifications_and_blocks_to_read() {
        let fired = document(&notice(Event::Fired));
        assert_eq!(
            fired["text"],
            ":information_source: info: device downtime is 1 min 30 s (device &lt;!channel&gt; &amp; 0)"
        );
        assert_eq!(fired["blocks"][2]["text"]["text"], "*What to look at next*\nLook.");
        assert_eq!(fired["blocks"][1]["fields"][0]["text"], "*Where*\ndevice &lt;!channel&gt; &amp; 0");
        let resolved = document(&notice(Event::Resolved));
        assert!(resolved["text"].as_str().unwrap().starts_with(":white_check_mark: resolved: "), "{resolved}");
        assert_eq!(resolved["blocks"].as_array().unwrap().len(), 3, "nothing to look at: {resolved}");
    }

    #[test]
    fn no_text_is_longer_than_slack_takes() {
        let long = "&".repeat(9000);
        let notice = Notice { of: Some(long.clone()), next: long.clone(), rule: long.clone(), ..notice(Event::Fired) };
        let document = document(&notice);
        for block in document["blocks"].as_array().unwrap() {
            let whole = block["text"]["text"].as_str().map_or(0, str::len);
            assert!(whole <= 3000, "{whole}");
            for field in block["fields"].as_array().into_iter().flatten() {
                assert!(field["text"].as_str().unwrap().len() <= 2000);
            }
        }
    }
}
