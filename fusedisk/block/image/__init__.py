"""Operations on whole images: create, check, amend, resize, measure, information, map."""
