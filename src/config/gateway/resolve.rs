//! From the sections to what is used: paths, secrets, schemas, names; and every check. Pure: environment and files come in as
//! [`Surroundings`].

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Map, Value};

use super::{
    CUSTOM, FIELDS, Fixed, FixedGateway, FixedProvider, GatewaySection, KeyFiles, MASK, PROVIDERS, ProviderSection,
    Resolved, SchemaSource, SecretRef, Sections, Settings, Timeouts, canonical, each_secret, is_plain_url, is_slug,
};
use crate::base::{AccountId, Secret};
use crate::config::machine::Surroundings;

/// Checks what was written in `origin`, whose folder relative paths start from.
pub(in crate::config) fn resolve(written: &Sections, origin: &str, folder: &Path, machine: &Surroundings) -> Resolved {
    let mut check = Check { origin, folder, machine, problems: Vec::new(), warnings: Vec::new() };
    let mut fixed = Fixed::default();
    for (index, section) in written.gateway.iter().enumerate() {
        gateway(&mut check, index, section, &mut fixed.gateways);
    }
    for (index, section) in written.provider.iter().enumerate() {
        provider(&mut check, index, section, &mut fixed.providers);
    }
    let state = state_folder(machine);
    let keys = KeyFiles {
        named: check.place("vault.master_key_file", written.vault.master_key_file.as_deref()),
        default: state.as_ref().map(|state| state.join("master.key")),
        previous: written
            .vault
            .previous_key_files
            .iter()
            .filter_map(|path| check.place("vault.previous_key_files", Some(path)))
            .collect(),
    };
    let registry = written.registry.folder.as_ref().map(|path| folder.join(path));
    let registry = registry.or_else(|| Some(state?.join("registry")));
    let Check { problems, warnings, .. } = check;
    Resolved { fixed, keys, registry, problems, warnings }
}

/// Where the daemon keeps what must outlive it, if the system says.
pub(in crate::config) fn state_folder(machine: &Surroundings) -> Option<PathBuf> {
    // systemd lists several with colons between them; the unit has one.
    let first = |name: &str| (machine.variable)(name)?.split(':').next().map(PathBuf::from);
    let absolute = |name: &str| first(name).filter(|path| path.is_absolute());
    absolute("STATE_DIRECTORY")
        .or_else(|| Some(absolute("XDG_STATE_HOME")?.join("neurond")))
        .or_else(|| Some(absolute("HOME")?.join(".local/state/neurond")))
}

fn gateway(check: &mut Check, index: usize, section: &GatewaySection, found: &mut Vec<FixedGateway>) {
    let key = format!("gateway[{index}] ({})", section.id);
    if !is_slug(&section.id) {
        let remedy = "is not a name for a gateway; use up to 64 letters, digits, - and _";
        check.wrong(&format!("gateway[{index}].id"), format_args!("{:?}", section.id), remedy);
    }
    let account = section.account.as_ref().map(|text| check.account(&format!("{key}.account"), text));
    if found.iter().any(|other| other.id == section.id && other.account == account) {
        check.wrong(
            &format!("gateway[{index}].id"),
            format_args!("{:?}", section.id),
            "is written twice; keep one of them",
        );
    }
    let mut fields = match serde_json::to_value(section) {
        Ok(Value::Object(fields)) => fields,
        Ok(_) => return check.problems.push(format!("{}: {key}: is not a table", check.origin)),
        Err(error) => return check.problems.push(format!("{}: {key}: {error}", check.origin)),
    };
    fields.retain(|name, _| FIELDS.contains(&name.as_str()));
    if let Some(schemas) = &section.schemas {
        let mut both = Map::new();
        for (side, source) in [("request", &schemas.request), ("response", &schemas.response)] {
            let schema = source.as_ref().and_then(|source| check.schema(&format!("{key}.schemas.{side}"), source));
            both.extend(schema.map(|schema| (side.to_owned(), schema)));
        }
        fields.insert("schemas".into(), Value::Object(both));
    }
    for (at, otel) in section.otel.iter().flatten().enumerate() {
        let secret = otel.authorization.as_ref();
        let secret = secret.and_then(|source| check.secret(&format!("{key}.otel[{at}].authorization"), source));
        if let Some(entry) = fields.get_mut("otel").and_then(|list| list.get_mut(at)).and_then(Value::as_object_mut) {
            entry.remove("authorization");
            entry.remove("allow_private");
            entry.extend(secret.map(|secret| ("authorization".to_owned(), secret.expose().as_str().into())));
        }
    }
    let mut settings = match Settings::check(&fields) {
        Ok(settings) => settings,
        Err(problems) => {
            return check.problems.extend(problems.iter().map(|problem| format!("{}: {key}.{problem}", check.origin)));
        }
    };
    for (otel, written) in settings.otel.iter_mut().zip(section.otel.iter().flatten()) {
        otel.allow_private = written.allow_private;
    }
    if settings.rate_limit.is_none() && section.rate_limiting_limit.is_some_and(|limit| limit > 0) {
        check.warnings.push(format!("{key}.rate_limiting_limit: limits nothing without rate_limiting_interval"));
    }
    // Cannot fail: masking does not.
    let _ = each_secret(&mut fields, |_, text| {
        MASK.clone_into(text);
        Ok(())
    });
    let origin = check.origin.to_owned();
    found.push(FixedGateway { account, id: section.id.clone(), fields, settings, origin });
}

fn provider(check: &mut Check, index: usize, section: &ProviderSection, found: &mut Vec<FixedProvider>) {
    let key = format!("provider[{index}] ({})", section.slug);
    let slug = canonical(&section.slug);
    let custom = slug.strip_prefix(CUSTOM);
    if !custom.map_or(PROVIDERS.contains(&slug), is_slug) {
        let remedy = format!(
            "is no provider; write one of {}, or {CUSTOM} and a name of your own: up to 64 letters, digits, - and _",
            PROVIDERS.join(", ")
        );
        check.wrong(&format!("provider[{index}].slug"), format_args!("{:?}", section.slug), &remedy);
    }
    let account = section.account.as_ref().map(|text| check.account(&format!("{key}.account"), text));
    if found.iter().any(|other| other.slug == slug && other.account == account) {
        let remedy = "is written twice; keep one of the blocks";
        check.wrong(&format!("provider[{index}].slug"), format_args!("{:?}", section.slug), remedy);
    }
    let allow_private = section.allow_private.unwrap_or(false);
    match &section.base_url {
        None if custom.is_some() => {
            check.problems.push(format!("{}: {key}.base_url: is missing; write where it answers", check.origin));
        }
        None => {}
        // Of some built-in providers a part of the host comes from the path of a call.
        Some(text) => match is_plain_url(&text.replace("{region}", "r").replace("{resource}", "r")) {
            None => {
                let remedy = "is not an address; write https://host/path, without credentials, ? and #";
                // There may be credentials in it.
                check.wrong(&format!("{key}.base_url"), format_args!("({} characters)", text.chars().count()), remedy);
            }
            Some(url) if url.scheme() == "http" && !allow_private => {
                let remedy = "sends keys and texts in the clear; write https://, or allow_private = true if the way there is yours";
                check.wrong(&format!("{key}.base_url"), format_args!("{text:?}"), remedy);
            }
            Some(_) => {}
        },
    }
    let mut timeout = |name: &str, ms: Option<u64>| {
        let ms = ms?;
        if !(1..=86_400_000).contains(&ms) {
            let remedy = "is out of range; write milliseconds from 1 to 86400000, or leave it out for the default";
            check.wrong(&format!("{key}.{name}"), ms, remedy);
        }
        Some(Duration::from_millis(ms))
    };
    let timeouts = Timeouts {
        request: timeout("request_timeout_ms", section.request_timeout_ms),
        first_byte: timeout("first_byte_timeout_ms", section.first_byte_timeout_ms),
        idle: timeout("idle_timeout_ms", section.idle_timeout_ms),
    };
    let secret = section.key.as_ref().and_then(|source| check.secret(&format!("{key}.key"), source));
    found.push(FixedProvider {
        account,
        slug: slug.to_owned(),
        base_url: section.base_url.as_ref().map(|text| text.trim_end_matches('/').to_owned()),
        allow_private,
        key: secret,
        timeouts,
        origin: check.origin.to_owned(),
    });
}

/// Collects what is wrong, in sentences that begin with the file and the key.
struct Check<'a> {
    origin: &'a str,
    folder: &'a Path,
    machine: &'a Surroundings<'a>,
    problems: Vec<String>,
    warnings: Vec<String>,
}

impl Check<'_> {
    fn wrong(&mut self, key: &str, value: impl std::fmt::Display, remedy: &str) {
        self.problems.push(format!("{}: {key} = {value}: {remedy}", self.origin));
    }

    fn account(&mut self, key: &str, text: &str) -> AccountId {
        let letter = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if !(1..=64).contains(&text.len()) || !text.chars().all(letter) {
            let remedy = "is not an account; write 32 hex digits, or up to 64 letters, digits, - and _";
            self.wrong(key, format_args!("{text:?}"), remedy);
        }
        AccountId::new(text)
    }

    /// A path, from the folder of the file or from where systemd puts credentials.
    fn place(&mut self, key: &str, path: Option<&Path>) -> Option<PathBuf> {
        let path = path?;
        let Ok(rest) = path.strip_prefix("$CREDENTIALS_DIRECTORY") else { return Some(self.folder.join(path)) };
        let Some(directory) = (self.machine.variable)("CREDENTIALS_DIRECTORY") else {
            let remedy = "needs CREDENTIALS_DIRECTORY, which systemd sets for units with LoadCredential=; write a path to use it \
                          elsewhere";
            self.wrong(key, path.display(), remedy);
            return None;
        };
        Some(Path::new(&directory).join(rest))
    }

    fn secret(&mut self, key: &str, source: &SecretRef) -> Option<Secret<String>> {
        let (shown, text) = match (&source.env, &source.file) {
            (Some(name), None) => {
                let Some(text) = (self.machine.variable)(name) else {
                    let remedy = "is not set in the environment; set it, or name a file";
                    self.wrong(&format!("{key}.env"), format_args!("{name:?}"), remedy);
                    return None;
                };
                (name.clone(), text)
            }
            (None, Some(path)) => {
                let path = self.place(&format!("{key}.file"), Some(path))?;
                match (self.machine.text)(&path) {
                    Ok(text) => (path.display().to_string(), text),
                    Err(error) => {
                        let remedy =
                            format!("cannot be read ({error}); correct it, or make it readable for the daemon");
                        self.wrong(&format!("{key}.file"), path.display(), &remedy);
                        return None;
                    }
                }
            }
            _ => {
                self.problems.push(format!("{}: {key}: must have either env or file", self.origin));
                return None;
            }
        };
        // Editors and echo end files with a newline that is no part of the secret. What is JSON may have more of them.
        let text = match serde_json::from_str::<Map<String, Value>>(&text) {
            Ok(object) => Value::Object(object).to_string(),
            Err(_) => text.trim().to_owned(),
        };
        if text.is_empty() || text.contains(char::is_control) {
            self.wrong(key, shown, "holds no secret of one line, or of a JSON object; put it there");
            return None;
        }
        Some(Secret::new(text))
    }

    fn schema(&mut self, key: &str, source: &SchemaSource) -> Option<Value> {
        let path = match source {
            SchemaSource::Inline(table) => return serde_json::to_value(table).ok(),
            SchemaSource::File(path) => self.place(key, Some(path))?,
        };
        let read = (self.machine.text)(&path).map_err(|error| format!("cannot be read ({error}); correct it"));
        let read = read
            .and_then(|text| serde_json::from_str(&text).map_err(|error| format!("is not JSON ({error}); correct it")));
        read.map_err(|remedy| self.wrong(key, path.display(), &remedy)).ok()
    }
}
