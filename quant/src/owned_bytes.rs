//! A vector of numbers as [`Bytes`].

use bytemuck::Pod;
use bytes::Bytes;

/// The bytes of `values` as they lie in memory, without a copy: they keep the alignment of `T`.
pub fn owned_bytes<T: Pod + Send>(values: Vec<T>) -> Bytes {
    Bytes::from_owner(Owner(values))
}

struct Owner<T>(Vec<T>);

impl<T: Pod> AsRef<[u8]> for Owner<T> {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_are_those_of_the_vector() {
        let values = vec![1.0f32, -2.5];
        let place = values.as_ptr().cast::<u8>();
        let bytes = owned_bytes(values);
        assert_eq!(bytes.as_ptr(), place, "nothing was copied");
        assert_eq!(bytemuck::cast_slice::<u8, f32>(&bytes), [1.0, -2.5]);
        assert!(owned_bytes(Vec::<f32>::new()).is_empty());
    }
}
