//! A notice as a mail, handed to an SMTP server.
//!
//! ```text
//!   Notice ──> subject, plain text, Message-ID: <notice's id>, References: <what it is about>  ──> SMTP (STARTTLS, TLS)
//! ```
//!
//! A notice that is sent twice has the same Message-ID, and what belongs to one alert stands in one thread.

use std::time::Duration;

use lettre::message::header::{ContentType, HeaderName, HeaderValue};
use lettre::message::{Mailbox, Message};
use lettre::transport::smtp::authentication::Credentials;
use lettre::transport::smtp::client::{Certificate, Tls as Privacy, TlsParameters};
use lettre::transport::smtp::{AsyncSmtpTransport, Error as SmtpError};
use lettre::{AsyncTransport, Tokio1Executor};

use super::failure::{Failure, cut};
use super::notice::{Event, Notice};
use super::settings::{Mail, Security, Severity};
use crate::base::{Error, Result};
use crate::net::client::Tls;

/// How long a server may take for each step.
const STEP: Duration = Duration::from_secs(20);
/// Letters of a subject.
const MAX_SUBJECT: usize = 200;
/// What servers answer when they do not believe who we are: may be mended, and is no word on the mail.
const NOT_LET_IN: [u16; 4] = [530, 534, 535, 538];

/// A server, a sender and those who get it.
pub(super) struct Mailer {
    server: AsyncSmtpTransport<Tokio1Executor>,
    from: Mailbox,
    to: Vec<Mailbox>,
}

impl Mailer {
    pub(super) fn new(mail: &Mail) -> Result<Self> {
        if mail.host.is_empty() {
            return Err(Error::bad_input("host is empty; name the mail server"));
        }
        if mail.security == Security::Plain && !mail.is_local() {
            return Err(Error::bad_input(
                "mail goes in plain to this machine only; use `starttls` or `tls` for other servers",
            ));
        }
        if mail.to.is_empty() {
            return Err(Error::bad_input("nobody gets the mail; name at least one address in `to`"));
        }
        let from = address(&mail.from)?;
        let to = mail.to.iter().map(|text| address(text)).collect::<Result<_>>()?;
        let privacy = privacy(mail)?;
        let port = mail.port.unwrap_or(match mail.security {
            Security::StartTls => 587,
            Security::Tls => 465,
            Security::Plain => 25,
        });
        let mut server = AsyncSmtpTransport::<Tokio1Executor>::builder_dangerous(&mail.host)
            .port(port)
            .tls(privacy)
            .timeout(Some(STEP));
        if let Some(login) = &mail.login {
            let credentials = Credentials::new(login.user.clone(), login.password.expose().clone());
            server = server.credentials(credentials);
        }
        Ok(Self { server: server.build(), from, to })
    }

    /// Hands it over, on a connection of its own.
    pub(super) async fn send(&self, notice: &Notice, instance: &str) -> Result<(), Failure> {
        let message = self.message(notice, instance)?;
        self.server.send(message).await.map(drop).map_err(|error| failure(&error))
    }

    fn message(&self, notice: &Notice, instance: &str) -> Result<Message, Failure> {
        let id = |id: &str| format!("<{id}@{}>", self.from.email.domain());
        let subject = format!("[{instance}] {}", notice.title()).replace(|letter: char| letter.is_control(), " ");
        let mut builder = Message::builder()
            .from(self.from.clone())
            .subject(cut(&subject, MAX_SUBJECT))
            .date_now()
            .message_id(Some(id(&notice.id)))
            .header(ContentType::TEXT_PLAIN);
        for to in &self.to {
            builder = builder.to(to.clone());
        }
        if notice.number > 0 {
            let first = id(&format!("{}-0", notice.alert));
            builder = builder.in_reply_to(first.clone()).references(first);
        }
        // No out-of-office replies to a machine.
        builder = builder.raw_header(raw("Auto-Submitted", "auto-generated"));
        if notice.severity == Severity::Critical && matches!(notice.event, Event::Fired | Event::Repeated) {
            builder = builder.raw_header(raw("Importance", "high"));
        }
        let text = notice.text(instance);
        builder.body(text).map_err(|error| Failure::later(format!("the mail cannot be written: {error}")))
    }
}

fn raw(name: &'static str, value: &str) -> HeaderValue {
    HeaderValue::new(HeaderName::new_from_ascii_str(name), value.to_owned())
}

fn address(text: &str) -> Result<Mailbox> {
    let words = |error| format!("`{text}` is no mail address ({error}); write name@example.com");
    text.parse().map_err(|error| Error::bad_input(words(error)))
}

fn privacy(mail: &Mail) -> Result<Privacy> {
    if mail.security == Security::Plain {
        return Ok(Privacy::None);
    }
    let mut tls = TlsParameters::builder(mail.host.clone());
    if let Some(pem) = &mail.authorities {
        let wrong = |why: String| Error::bad_input(format!("ca_file {why}"));
        // Says more than the library about what is wrong.
        Tls::new(Some(pem)).map_err(wrong)?;
        let certificate = Certificate::from_pem(pem.as_bytes()).map_err(|error| wrong(error.to_string()))?;
        tls = tls.add_root_certificate(certificate);
    }
    let tls = tls.build_rustls().map_err(|error| Error::bad_input(format!("host `{}`: {error}", mail.host)))?;
    Ok(if mail.security == Security::Tls { Privacy::Wrapper(tls) } else { Privacy::Required(tls) })
}

fn failure(error: &SmtpError) -> Failure {
    let mut why = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !why.contains(&cause_text) {
            why = format!("{why}: {cause_text}");
        }
        source = cause.source();
    }
    let code = error.status().map(u16::from);
    let is_refusal = error.is_permanent() && !code.is_some_and(|code| NOT_LET_IN.contains(&code));
    Failure { why, is_refusal, wait: None }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::alert::settings::Login;
    use crate::base::{Millis, Secret};

    fn mail() -> Mail {
        Mail {
            host: "mail.example.com".into(),
            port: None,
            security: Security::StartTls,
            login: Some(Login { user: "neurond".into(), password: Secret::new("s3cret".into()) }),
            from: "neurond <neurond@example.com>".into(),
            to: vec!["ops@example.com".into(), "Boss <boss@example.com>".into()],
            authorities: None,
        }
    }

    #[test]
    fn what_cannot_be_meant_is_refused_with_what_to_write_instead() {
        let check = |change: &dyn Fn(&mut Mail), words: Option<&str>| {
            let mut mail = mail();
            change(&mut mail);
            let said = Mailer::new(&mail).map(|_| ()).map_err(|error| error.message().to_owned());
            match words {
                None => assert_eq!(said, Ok(())),
                Some(words) => assert!(said.as_ref().is_err_and(|said| said.contains(words)), "{words}: {said:?}"),
            }
        };
        check(&|_| {}, None);
        check(&|mail| mail.host = String::new(), Some("name the mail server"));
        check(&|mail| mail.security = Security::Plain, Some("to this machine only"));
        check(&|mail| (mail.security, mail.host) = (Security::Plain, "::1".into()), None);
        check(&|mail| mail.to.clear(), Some("at least one address"));
        check(&|mail| mail.to = vec!["nobody".into()], Some("`nobody` is no mail address"));
        check(&|mail| mail.from = "a@b@c".into(), Some("is no mail address"));
        check(&|mail| mail.authorities = Some("nothing".into()), Some("ca_file holds no certificate"));
    }

    #[test]
    fn a_mail_has_a_stable_id_stands_in_its_thread_and_no_name_adds_a_header() {
        let mailer = Mailer::new(&mail()).unwrap();
        let mut notice = Notice::test(Millis(1_750_000_000_000));
        (notice.alert, notice.id, notice.number) = ("abc".into(), "abc-2".into(), 2);
        (notice.event, notice.value, notice.severity) = (Event::Repeated, Some(5.0), Severity::Critical);
        notice.of = Some("device\r\nBcc: all@example.com".into());
        let text = String::from_utf8(mailer.message(&notice, "here").unwrap().formatted()).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        for line in [
            "Message-ID: <abc-2@example.com>",
            "In-Reply-To: <abc-0@example.com>",
            "References: <abc-0@example.com>",
            "To: ops@example.com, Boss <boss@example.com>",
            "Auto-Submitted: auto-generated",
            "Importance: high",
            "Subject: [here] still critical: device downtime is 5 s (device  Bcc:",
        ] {
            assert!(head.contains(line), "{line}\n{head}");
        }
        assert!(!head.lines().any(|line| line.starts_with("Bcc")), "{head}");
        assert!(body.contains("What to look at next"), "{body}");
    }
}
