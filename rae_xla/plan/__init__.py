"""What a run will cost before a pod is rented: memory, arithmetic, traffic, time, money."""
