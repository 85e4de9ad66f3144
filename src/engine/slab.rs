//! Values under small keys that are used again. Indexing with a key whose value is gone is a bug of the caller and panics;
//! [`Slab::get`] and [`Slab::remove`] do not.

/// What a panic says.
const ABSENT: &str = "a key that the scheduler holds has its value";

/// Values by key.
pub(super) struct Slab<T> {
    slots: Vec<Option<T>>,
    vacant: Vec<u32>,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Self { slots: Vec::new(), vacant: Vec::new() }
    }
}

impl<T> Slab<T> {
    pub(super) fn insert(&mut self, value: T) -> u32 {
        let key = self.vacant.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() as u32 - 1
        });
        self.slots[key as usize] = Some(value);
        key
    }

    pub(super) fn remove(&mut self, key: u32) -> Option<T> {
        let value = self.slots.get_mut(key as usize)?.take()?;
        self.vacant.push(key);
        Some(value)
    }

    pub(super) fn get(&self, key: u32) -> Option<&T> {
        self.slots.get(key as usize)?.as_ref()
    }

    pub(super) fn get_mut(&mut self, key: u32) -> Option<&mut T> {
        self.slots.get_mut(key as usize)?.as_mut()
    }

    pub(super) fn len(&self) -> usize {
        self.slots.len() - self.vacant.len()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, &T)> {
        self.slots.iter().enumerate().filter_map(|(key, value)| Some((key as u32, value.as_ref()?)))
    }
}

#[allow(clippy::expect_used)]
impl<T> std::ops::Index<u32> for Slab<T> {
    type Output = T;
    fn index(&self, key: u32) -> &T {
        self.slots[key as usize].as_ref().expect(ABSENT)
    }
}

#[allow(clippy::expect_used)]
impl<T> std::ops::IndexMut<u32> for Slab<T> {
    fn index_mut(&mut self, key: u32) -> &mut T {
        self.slots[key as usize].as_mut().expect(ABSENT)
    }
}
