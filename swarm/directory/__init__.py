"""The hivemind DHT kept in hand: signed offers, the tables they lie in, and who reads which of them."""
