"""From files to rows of token ids, in an order that nothing but the recipe decides."""
