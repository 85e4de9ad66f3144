//! Who has which adapters. Pure: what is on disk is [`super::disk`]'s, what is in memory [`super::cache`]'s.

use std::collections::HashMap;

use uuid::Uuid;

use crate::base::{AccountId, Error, Kind, Millis, ModelId, Result};
use crate::model::lora::{CONFIG_FILE, WEIGHTS_FILE};

/// Longest name and description.
const MAX_NAME: usize = 64;
const MAX_DESCRIPTION: usize = 1024;

/// An adapter that an account has made known, complete or not.
#[derive(Clone, Debug, PartialEq)]
pub struct Finetune {
    /// Names it for ever.
    pub id: Uuid,
    /// Whose it is.
    pub account: AccountId,
    /// Unique in its account.
    pub name: String,
    /// The base it is for.
    pub model: ModelId,
    /// For people.
    pub description: String,
    /// When it was made known.
    pub created: Millis,
    /// When its newest file came.
    pub modified: Millis,
    /// Whether `adapter_config.json` is there.
    pub has_config: bool,
    /// Whether `adapter_model.safetensors` is there.
    pub has_weights: bool,
    /// Counts up with every file that is taken in: what was opened before is another adapter.
    pub(super) version: u64,
}

impl Finetune {
    /// Whether requests may name it.
    ///
    /// # Errors
    /// [`Kind::Incomplete`] with the names of what is missing.
    pub fn complete(&self) -> Result<()> {
        let files = [(self.has_config, CONFIG_FILE), (self.has_weights, WEIGHTS_FILE)];
        let missing: Vec<_> = files.into_iter().filter(|(there, _)| !there).map(|(_, name)| name).collect();
        if missing.is_empty() {
            return Ok(());
        }
        let message =
            format!("The fine-tune {:?} is missing required files: upload {}.", self.name, missing.join(" and "));
        Err(Error::new(Kind::Incomplete, message).with_param("lora"))
    }
}

/// What a caller says of a new adapter.
#[derive(Clone, Debug)]
pub struct Draft {
    /// How requests will name it.
    pub name: String,
    /// The base it is for.
    pub model: ModelId,
    /// For people.
    pub description: String,
}

/// All adapters, by account.
#[derive(Default)]
pub(super) struct Book {
    accounts: HashMap<AccountId, Vec<Finetune>>,
}

impl Book {
    /// What was found on disk.
    pub(super) fn of(found: Vec<Finetune>) -> Self {
        let mut book = Self::default();
        found.into_iter().for_each(|finetune| book.insert(finetune));
        book
    }

    /// Makes an entry of a draft, which is not in the book yet.
    ///
    /// # Errors
    /// `BadInput` when the name is taken or no name, or the account has `most` already.
    pub(super) fn draft(&self, account: &AccountId, draft: Draft, most: usize, now: Millis) -> Result<Finetune> {
        let Draft { name, model, description } = draft;
        let letter = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        let good = !name.is_empty() && name.len() <= MAX_NAME && name.chars().all(letter) && !name.starts_with('.');
        if !good || Uuid::try_parse(&name).is_ok() {
            let message = format!(
                "'name' must be 1 to {MAX_NAME} letters, digits, - _ and ., not beginning with a dot and no UUID"
            );
            return Err(Error::bad_field("name", message));
        }
        if description.chars().count() > MAX_DESCRIPTION {
            return Err(Error::bad_field(
                "description",
                format!("'description' may have at most {MAX_DESCRIPTION} characters"),
            ));
        }
        let own = self.list(account);
        if own.iter().any(|other| other.name == name) {
            return Err(Error::bad_field(
                "name",
                format!("there is a fine-tune named {name:?} already: delete it, or choose another name"),
            ));
        }
        if own.len() >= most {
            return Err(Error::bad_input(format!(
                "this account has {most} fine-tunes, the most that is allowed: delete one"
            )));
        }
        Ok(Finetune {
            id: Uuid::new_v4(),
            account: account.clone(),
            name,
            model,
            description,
            created: now,
            modified: now,
            has_config: false,
            has_weights: false,
            version: 0,
        })
    }

    pub(super) fn insert(&mut self, finetune: Finetune) {
        self.accounts.entry(finetune.account.clone()).or_default().push(finetune);
    }

    pub(super) fn remove(&mut self, account: &AccountId, id: Uuid) {
        if let Some(own) = self.accounts.get_mut(account) {
            own.retain(|finetune| finetune.id != id);
        }
    }

    /// An account's adapters, oldest first.
    pub(super) fn list(&self, account: &AccountId) -> &[Finetune] {
        self.accounts.get(account).map_or(&[], Vec::as_slice)
    }

    /// One of an account's own, by id or name.
    ///
    /// # Errors
    /// [`Kind::NotFound`]: what others have looks the same as what nobody has.
    pub(super) fn find(&self, account: &AccountId, key: &str) -> Result<&Finetune> {
        self.search(account, key)
            .ok_or_else(|| Error::new(Kind::NotFound, format!("there is no fine-tune {:?}", told(key))))
    }

    /// One that a request of `account` may use: its own, or one of `public`.
    ///
    /// # Errors
    /// `BadInput` for names that nobody knows and for another base's.
    pub(super) fn usable(
        &self,
        account: &AccountId,
        public: Option<&AccountId>,
        key: &str,
        model: &ModelId,
    ) -> Result<&Finetune> {
        let found = self.search(account, key).or_else(|| self.search(public?, key));
        let found = found.ok_or_else(|| {
            Error::bad_field(
                "lora",
                format!("this account has no fine-tune {:?}: create it and upload its files first", told(key)),
            )
        })?;
        if found.model != *model {
            let message = format!("the fine-tune {:?} is for {}, not for {model}", found.name, found.model);
            return Err(Error::bad_field("lora", message));
        }
        found.complete().map(|()| found)
    }

    fn search(&self, account: &AccountId, key: &str) -> Option<&Finetune> {
        let own = self.list(account);
        match Uuid::try_parse(key) {
            Ok(id) => own.iter().find(|finetune| finetune.id == id),
            Err(_) => own.iter().find(|finetune| finetune.name == key),
        }
    }

    /// A file of an adapter is in its place.
    pub(super) fn taken_in(&mut self, account: &AccountId, id: Uuid, file: &str, now: Millis) -> Option<&Finetune> {
        let finetune = self.accounts.get_mut(account)?.iter_mut().find(|finetune| finetune.id == id)?;
        match file {
            CONFIG_FILE => finetune.has_config = true,
            _ => finetune.has_weights = true,
        }
        finetune.modified = now;
        finetune.version += 1;
        Some(finetune)
    }
}

/// A name as far as it is repeated in an error.
fn told(key: &str) -> String {
    key.chars().take(MAX_NAME).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Millis = Millis(7);

    fn account(name: &str) -> AccountId {
        AccountId::new(name)
    }

    fn draft(name: &str) -> Draft {
        Draft { name: name.to_owned(), model: ModelId::new("m"), description: String::new() }
    }

    fn book() -> Book {
        let mut book = Book::default();
        for (owner, name) in [("ada", "mine"), ("house", "shared"), ("bob", "mine")] {
            book.insert(book.draft(&account(owner), draft(name), 100, NOW).unwrap());
        }
        book
    }

    #[test]
    fn names_are_checked_unique_and_counted() {
        let book = book();
        let check = |name: &str, words: &str| match book.draft(&account("ada"), draft(name), 2, NOW) {
            Ok(_) => assert_eq!(words, "good", "{name}"),
            Err(error) => assert!(error.message().contains(words), "{name}: {error}"),
        };
        check("another-one_v1.2", "good");
        check("mine", "already");
        for bad in [
            "",
            ".",
            "..",
            ".hidden",
            "a/b",
            "a\\b",
            "a b",
            "ä",
            "a\0",
            &"x".repeat(65),
            "0e8c6b5e-6f0d-4b7e-9a53-0d7c1f2a3b4c",
        ] {
            check(bad, "'name' must be");
        }
        let full = book.draft(&account("ada"), draft("second"), 1, NOW).unwrap_err();
        assert!(full.message().contains("has 1 fine-tunes"), "{full}");
        let long = Draft { description: "x".repeat(1025), ..draft("second") };
        assert!(book.draft(&account("ada"), long, 9, NOW).unwrap_err().message().contains("description"));
    }

    #[test]
    fn an_account_sees_its_own_and_may_use_public_ones() {
        let mut book = book();
        let (ada, bob, house, model) = (account("ada"), account("bob"), account("house"), ModelId::new("m"));
        let id = book.find(&bob, "mine").unwrap().id;
        assert_eq!(book.find(&bob, &id.to_string()).unwrap().id, id);
        assert_eq!(book.find(&ada, &id.to_string()).unwrap_err().kind(), Kind::NotFound);
        assert_eq!(book.find(&ada, "shared").unwrap_err().kind(), Kind::NotFound);
        let usable = |book: &Book, key: &str, model: &ModelId| {
            book.usable(&ada, Some(&house), key, model).map(|found| found.name.clone())
        };
        assert_eq!(usable(&book, "shared", &model).unwrap_err().kind(), Kind::Incomplete);
        let shared = book.find(&house, "shared").unwrap().id;
        book.taken_in(&house, shared, CONFIG_FILE, NOW).unwrap();
        let error = usable(&book, "shared", &model).unwrap_err();
        assert!(error.message().contains("upload adapter_model.safetensors"), "{error}");
        book.taken_in(&house, shared, WEIGHTS_FILE, NOW).unwrap();
        assert_eq!(usable(&book, "shared", &model).unwrap(), "shared");
        assert!(
            usable(&book, "shared", &ModelId::new("other")).unwrap_err().message().contains("is for m, not for other")
        );
        assert!(usable(&book, "nobody's", &model).unwrap_err().message().contains("no fine-tune"));
        assert!(book.usable(&ada, None, "shared", &model).is_err());
        book.remove(&house, shared);
        assert!(usable(&book, "shared", &model).is_err());
    }
}
