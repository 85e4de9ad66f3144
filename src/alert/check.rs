//! What of the settings cannot be meant, and what to write instead.

use std::collections::HashSet;
use std::time::Duration;

use super::send::Sender;
use super::settings::{Channel, Rule, Settings};
use crate::base::{Error, Result};

impl Settings {
    /// Says of the first thing that cannot be meant what it is and what to write instead.
    ///
    /// # Errors
    /// `BadInput`.
    pub fn check(&self) -> Result<()> {
        if self.every.is_zero() {
            return Err(Error::bad_input("alerts: rules cannot be looked at every 0 s; 10 s is usual"));
        }
        if self.retry.is_zero() {
            return Err(Error::bad_input("alerts: a failed delivery cannot be tried again after 0 s; 5 s are usual"));
        }
        let mut names = HashSet::new();
        for Channel { name, to } in &self.channels {
            if name.is_empty() || !names.insert(name.as_str()) {
                let words = format!("alerts: the channel name \"{name}\" is empty or taken; give each its own");
                return Err(Error::bad_input(words));
            }
            Sender::new(to).map_err(|error| error.context(format_args!("alerts: channel \"{name}\"")))?;
        }
        let mut rules = HashSet::new();
        for rule in &self.rules {
            let wrong = |words: String| Err(Error::bad_input(format!("alerts: rule \"{}\": {words}", rule.name)));
            if rule.name.is_empty() || !rules.insert(rule.name.as_str()) {
                return wrong("the name is empty or taken; give each rule its own".into());
            }
            if let Err(words) = rule.check() {
                return wrong(words);
            }
            if let Some(unknown) = rule.channels.iter().find(|name| !names.contains(name.as_str())) {
                return wrong(format!("there is no channel \"{unknown}\"; name one that is there, or none for all"));
            }
        }
        Ok(())
    }
}

impl Rule {
    fn check(&self) -> Result<(), String> {
        if !self.threshold.is_finite() || self.threshold <= 0.0 {
            return Err(format!("a threshold of {} is always or never reached; take one above 0", self.threshold));
        }
        let most = if self.measure.what.is_share() { 100.0 } else { f64::INFINITY };
        if self.threshold > most {
            return Err(format!("a threshold of {} % is never reached; it is a percentage", self.threshold));
        }
        if let Some(below) = self.resolve_below.filter(|below| !(*below > 0.0 && *below <= self.threshold)) {
            let threshold = self.threshold;
            return Err(format!("it cannot be over below {below}; take a figure above 0, up to {threshold}"));
        }
        if self.repeat.is_some_and(|repeat| repeat < Duration::from_secs(1)) {
            return Err("it cannot be repeated more often than every second; leave `repeat` out to tell it once".into());
        }
        match self.measure.what.window() {
            Some(window) if window.is_zero() => Err("a window of 0 s has nothing in it; 5 minutes are usual".into()),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::settings::{Errors, Filter, Measure, To, Webhook, What};
    use super::*;
    use crate::base::Secret;
    use crate::net::client;

    fn settings() -> Settings {
        let tls = client::Tls::new(None).unwrap();
        let connect_timeout = Duration::from_secs(5);
        let mut settings = Settings::new(client::Settings { connect_timeout, allow_private: false, proxy: None, tls });
        let what = What::ErrorRate { window: Duration::from_secs(300), errors: Errors::Server, min_requests: 20 };
        settings.rules = vec![Rule::new("errors", Measure { what, filter: Filter::default() }, 5.0)];
        settings.rules[0].channels = vec!["hook".into()];
        let url = Secret::new("https://example.com/hook".into());
        let to = To::Webhook(Webhook { url, secret: None, allow_private: false });
        settings.channels = vec![Channel { name: "hook".into(), to }];
        settings
    }

    #[test]
    fn what_cannot_be_meant_is_refused_with_what_to_write_instead() {
        let check = |change: &dyn Fn(&mut Settings), words: &str| {
            let mut settings = settings();
            change(&mut settings);
            let said = settings.check().map_err(|error| error.message().to_owned());
            let is_right = match words {
                "" => said.is_ok(),
                words => said.as_ref().is_err_and(|said| said.contains(words)),
            };
            assert!(is_right, "{words}: {said:?}");
        };
        let rule = |change: &dyn Fn(&mut Rule), words: &str| check(&|settings| change(&mut settings.rules[0]), words);
        check(&|_| {}, "");
        check(&|settings| settings.every = Duration::ZERO, "10 s is usual");
        check(&|settings| settings.retry = Duration::ZERO, "5 s are usual");
        check(&|settings| settings.channels[0].name = String::new(), "give each its own");
        check(&|settings| settings.channels.push(settings.channels[0].clone()), "give each its own");
        check(&|settings| settings.rules.push(settings.rules[0].clone()), "give each rule its own");
        rule(&|rule| rule.name.clear(), "rule \"\": the name is empty");
        rule(&|rule| rule.channels = vec!["pager".into()], "there is no channel \"pager\"");
        rule(&|rule| rule.threshold = 0.0, "take one above 0");
        rule(&|rule| rule.threshold = f64::NAN, "take one above 0");
        rule(&|rule| rule.threshold = 101.0, "it is a percentage");
        rule(&|rule| rule.resolve_below = Some(5.0), "");
        rule(&|rule| rule.resolve_below = Some(5.1), "a figure above 0, up to 5");
        rule(&|rule| rule.resolve_below = Some(0.0), "a figure above 0, up to 5");
        rule(&|rule| rule.repeat = Some(Duration::from_millis(999)), "more often than every second");
        let cost = |window| What::Cost { window };
        rule(&|rule| rule.measure.what = cost(Some(Duration::ZERO)), "a window of 0 s has nothing in it");
        rule(&|rule| (rule.measure.what, rule.threshold) = (cost(None), 1000.0), "");
        let empty = |settings: &mut Settings| {
            if let To::Webhook(hook) = &mut settings.channels[0].to {
                hook.secret = Some(Secret::new(String::new()));
            }
        };
        check(&empty, "channel \"hook\": the secret is empty");
    }
}
