"""Which records stay: policies, hints and quotas, all pure."""
